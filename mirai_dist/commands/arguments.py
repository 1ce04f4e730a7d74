"""Arguments of the verbs that need torch, shared by `mirai` (which never imports it) and the commands themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verb:
    """A verb: the module that runs it, one line of help, its arguments, and whether `--nproc` starts several ranks."""

    module: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    ranks: bool = False


def import_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="official or diffusers folder, .safetensors or .pt")
    parser.add_argument("--out", type=Path, required=True, help="new folder in the official layout")
    parser.add_argument("--kind", choices=("diffusion", "ar", "ode", "cd", "dmd"), help="what the weights are")
    parser.add_argument("--which", choices=("raw", "ema"), default="raw", help="weights as trained, or their average")


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN", type=Path, help="run, stage or checkpoint directory")
    parser.add_argument("--to", choices=("wan", "diffusers", "self-forcing"), required=True, help="layout to write")
    parser.add_argument("--which", choices=("raw", "ema"), default="ema", help="weights as trained, or their average")
    parser.add_argument("--out", type=Path, required=True, help="new folder (wan, diffusers) or .pt file")
    parser.add_argument("--stage", help="stage of the run (default: the last one)")
    parser.add_argument("--arm", help="arm of the dmd stage (default: foresight, else the first)")
    parser.add_argument("--seed", type=int, help="training seed of the arm (default: the first)")


def data(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    embed = verbs.add_parser("embed", help="precompute the text embeddings of a prompt file")
    embed.add_argument("prompts", metavar="PROMPTS", type=Path, help="prompt file, UTF-8, one a line")
    embed.add_argument("--encoder", type=Path, required=True, help="folder of UMT5 and its tokenizer")
    embed.add_argument("--out", type=Path, required=True, help="folder of the embeddings")
    embed.add_argument("--length", type=int, default=512, help="longest prompt in tokens (Wan: 512)")
    embed.add_argument("--shard-size", type=int, default=2048, help="prompts a shard file")
    embed.add_argument("--part", default="0/1", metavar="I/N", help="make shards I, I + N, ... (job arrays)")
    _data_latents(verbs.add_parser("latents", help="encode a folder of videos with the VAE"))
    make = verbs.add_parser("make", help="trajectories of the AR teacher, for an ode stage")
    make.add_argument("item", metavar="ITEM", choices=("ode",), help="ode")
    make.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    make.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override of a recipe key")
    make.add_argument("--run-dir", type=Path, help="run directory that holds the AR teacher (default: runs/<name>)")
    make.add_argument("--stage", help="stage of kind ode (default: the first)")
    make.add_argument("--part", default="0/1", metavar="I/N", help="make shards I, I + N, ... (job arrays)")
    convert = verbs.add_parser("convert", help="between a store and the published LMDB layout, bit for bit")
    convert.add_argument("source", metavar="SOURCE", type=Path, help="store, LMDB folder, or folder of LMDB folders")
    convert.add_argument("--to", choices=("lmdb", "mirai"), required=True, help="layout to write")
    convert.add_argument("--out", type=Path, required=True, help="new folder; a store that was begun goes on")
    convert.add_argument("--shard-size", type=int, default=16, help="entries a shard file of a store")
    convert.add_argument("--timesteps", default="", metavar="T,T,...", help="of LMDB rows that are not published ones")
    verify = verbs.add_parser("verify", help="read everything and name what is damaged")
    verify.add_argument("stores", metavar="STORE", type=Path, nargs="+", help="embeddings, latents, ODE pairs, LMDB")
    _data_estimate(verbs.add_parser("estimate", help="FLOPs, bytes and GPU-hours before anything is made"))


def _data_latents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", metavar="VIDEOS", type=Path, help="folder of mp4 and other videos, taken by name")
    parser.add_argument("--vae", type=Path, required=True, help="VAE folder of diffusers, or Wan2.1_VAE.pth")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store")
    parser.add_argument("--frames", type=int, default=81, help="pixel frames of a clip, 1 + 4 n, from the beginning")
    parser.add_argument("--size", default="480x832", metavar="HxW", help="pixels; resized, the centre is kept")
    parser.add_argument("--fps", type=int, default=16, help="frame rate that videos are brought to")
    parser.add_argument("--captions", type=Path, help="captions by line (default: the .txt beside each video)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the stored latents")
    parser.add_argument("--shard-size", type=int, default=64, help="videos a shard file")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="make shards I, I + N, ... (job arrays)")


def _data_estimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("item", metavar="ITEM", choices=("embed", "latents", "ode"), help="embed, latents or ode")
    parser.add_argument("--count", type=int, required=True, help="prompts or videos")
    parser.add_argument("--gpu", default="", help="a100, h100, h200 or b200; another one: FLOPs and bytes only")
    parser.add_argument("--utilisation", type=float, default=0.4, help="fraction of the GPU's peak that is assumed")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt (embed)")
    parser.add_argument("--frames", type=int, default=81, help="pixel frames (latents)")
    parser.add_argument("--size", default="480x832", metavar="HxW", help="pixels (latents)")
    parser.add_argument("--segments", choices=("chunk", "frame"), default="chunk", help="of the AR teacher (ode)")


def sample(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SAMPLE_WINDOWS
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="run directory, weight folder or .pt file")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt file, UTF-8, one a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of the videos; what is there is not made again")
    parser.add_argument("--recipe", type=Path, help="recipe of shape, text, VAE and steps, for a file that has none")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: text.path=umt5")
    parser.add_argument("--seconds", type=float, help="length of a video (default: that of training)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; video i of a prompt draws its own")
    parser.add_argument("--nproc", type=int, help="processes on this machine that share the list")
    parser.add_argument("--samples", type=int, default=1, help="videos a prompt: {prompt}-0.mp4, -1.mp4, ...")
    parser.add_argument("--names", type=Path, help="file of the names' prompts, line by line (extended captions)")
    parser.add_argument("--which", choices=("raw", "ema"), default="ema", help="weights as trained, or their average")
    parser.add_argument("--kind", choices=("ar", "ode", "cd", "dmd"), help="what a file holds that does not record it")
    parser.add_argument("--stage", help="stage of the run (default: the last one)")
    parser.add_argument("--arm", help="arm of the dmd stage (default: foresight, else the first)")
    parser.add_argument("--training-seed", type=int, help="training seed of the arm (default: the first)")
    parser.add_argument("--window", type=int, help="latent frames attention sees, the present segment included; 0: all")
    parser.add_argument("--sink", type=int, help="first latent frames that a sliding window keeps")
    parser.add_argument("--images", type=Path, help="folder of first frames, {line}.png from 0 (frame-wise recipes)")
    parser.add_argument("--gif", action="store_true", help="write a GIF beside each video")
    parser.add_argument("--grid", action="store_true", help="write grid.mp4 of the first 16 videos at the end")


SAMPLE_WINDOWS = """\
windows (latent frames; 1 + 4 (n - 1) pixel frames):
  A video no longer than a training rollout attends as the recipe says (rollout.window_frames, rollout.sink_frames).
  A longer one slides a window: --window, else rollout.window_frames, else video.latent_frames; it keeps --sink, else
  rollout.sink_frames, else one segment. Both are multiples of video.frames_per_segment.
  A segment of L frames sees itself, the newest W - L - S frames and the first S frames of the video (sinks). Until
  the window slides nothing differs from no window. Then the sinks are shown at the positions directly before the
  oldest of the newest frames, so no distance in time exceeds W - 1, as in training. The cache holds W frames.
  A video ends at 1,024 latent frames. 16 fps: 5 s are 21 frames, 30 s are 123 (segments of 3) or 121 (of 1).
"""


def shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: video.fps=8")
    parser.add_argument("--out", type=Path, required=True, help="new folder: recipe, weights, prompts, embeddings")
    parser.add_argument("--ranks", metavar="N", type=int, help="ranks the recipe is for (default: -NODESxGPUS, or 2)")


def bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="WHAT", choices=("kernels",), help="kernels: operators and attention backends")
    parser.add_argument("--certify", metavar="RECIPE", type=Path, required=True, help="at the shapes of this recipe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override of a recipe key")
    parser.add_argument("--out", type=Path, help="folder (default: the recipe's parallel.certificate_folder)")


VERBS = {
    "import": Verb("mirai_dist.commands.import_weights", "bring weights into one checked form", import_weights),
    "export": Verb("mirai_dist.commands.export", "write trained weights for other programs", export),
    "data": Verb("mirai_dist.commands.data", "prepare data: embeddings, latents, ODE pairs", data),
    "sample": Verb("mirai_dist.commands.sample", "generate videos from a run or a weight file", sample, ranks=True),
    "bench": Verb("mirai_dist.commands.bench", "hold kernels and attention against float64 on this machine", bench),
    "shrink": Verb("mirai_dist.commands.shrink", "derive a tiny twin of a recipe, with all its files", shrink),
}
