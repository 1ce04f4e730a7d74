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
  oldest of the newest frames, so no distance in time exceeds W - 1, as in training. The cache holds W - L frames.
  A video ends at 1,024 latent frames. 16 fps: 5 s are 21 frames, 30 s are 123 (segments of 3) or 121 (of 1).
"""


def shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="recipe file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override: video.fps=8")
    parser.add_argument("--out", type=Path, required=True, help="new folder: recipe, weights, prompts, embeddings")
    parser.add_argument("--ranks", metavar="N", type=int, help="ranks the recipe is for (default: -NODESxGPUS, or 2)")


VERBS = {
    "import": Verb("mirai_dist.commands.import_weights", "bring weights into one checked form", import_weights),
    "export": Verb("mirai_dist.commands.export", "write trained weights for other programs", export),
    "data": Verb("mirai_dist.commands.data", "prepare data: text embeddings", data),
    "sample": Verb("mirai_dist.commands.sample", "generate videos from a run or a weight file", sample, ranks=True),
    "shrink": Verb("mirai_dist.commands.shrink", "derive a tiny twin of a recipe, with all its files", shrink),
}
