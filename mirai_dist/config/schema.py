"""Every key a recipe may hold: frozen dataclasses, one a section, read by `mirai_dist.config.load`.

The schema is closed: a key that is not a field here is an error. Each field carries one line of help
(shown by `mirai check --explain KEY`) and, where only some strings make sense, the list of choices.
No torch here: a login node imports this file.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any


def key(default: Any = MISSING, *, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A recipe key: its default (none: the recipe must set it), its one-line help, its legal strings."""
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Video:
    """Shape of one latent video and of the segments it is generated in."""

    latent_frames: int = key(help="latent frames of a training rollout (Wan: 21)")
    frames_per_segment: int = key(help="latent frames generated at a time: 3 chunk-wise, 1 frame-wise")
    channels: int = key(16, help="latent channels (Wan's VAE: 16)")
    latent_height: int = key(help="latent rows; pixels / 8 (480p: 60)")
    latent_width: int = key(help="latent columns; pixels / 8 (480p: 104)")
    fps: int = key(16, help="frames a second of the written videos")


@dataclass(frozen=True, kw_only=True)
class World:
    """The procedural video world that stands in for a data set (mirai_dist/data/world.py)."""

    speed: float = key(2.5, help="pixels a shape moves per latent frame (four pixel frames)")
    radius: float = key(5.5, help="half extent of a shape, pixels")
    radius_jitter: float = key(0.0, help="each clip's radius is drawn from radius +- this, pixels")
    level: str = key(
        "free",
        help="free: one shape, walls out of reach during a training clip; bounce: starts anywhere and "
        "reflects; occlusion: bounce, and a grey pillar hides the middle of the picture",
        choices=("free", "bounce", "occlusion"),
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on beside the procedural world."""

    prompts: str = key("", help="prompts of dmd stages, one a line, UTF-8; empty: captions of latents, or of the world")
    latents: str = key(
        "", help="clean latents that earlier stages train on, our store or the published LMDB; empty: the world's clips"
    )
    ode_pairs: str = key("", help="trajectories that ode stages train on; empty: they make their own")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A file or folder of published weights that stages may start from, under the name it has here."""

    path: str = key(help="official or diffusers folder, or a .pt file of Self-Forcing, Causal-Forcing, CausVid or ours")
    kind: str = key(
        "",
        help="what the weights are: diffusion (bidirectional), ar (causal, many steps), ode, cd or dmd (causal, few "
        "steps); empty: what the file itself records",
        choices=("", "diffusion", "ar", "ode", "cd", "dmd"),
    )
    which: str = key("raw", help="weights as trained, or their moving average", choices=("raw", "ema"))


@dataclass(frozen=True, kw_only=True)
class Vae:
    """The frozen video autoencoder."""

    kind: str = key(
        "linear", help="linear: the fixed transform of the world; wan: AutoencoderKLWan", choices=("linear", "wan")
    )
    path: str = key("", help="wan: diffusers VAE folder, official folder, or Wan2.1_VAE.pth")


@dataclass(frozen=True, kw_only=True)
class Text:
    """The frozen text encoder."""

    encoder: str = key(
        "vocabulary",
        help="vocabulary: fixed embeddings of the world's words; umt5: UMT5 held by the job; store: embeddings "
        "precomputed by `mirai data embed`, no encoder in the job",
        choices=("vocabulary", "umt5", "store"),
    )
    path: str = key("", help="umt5: folder with encoder and tokenizer; store: folder of the embeddings")
    dim: int = key(help="width of a text embedding (UMT5-XXL: 4096)")
    length: int = key(help="positions a prompt is padded to with zeros (Wan: 512)")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Shape of one Wan DiT."""

    dim: int = key(help="model width (1.3B: 1536, 14B: 5120)")
    ffn_dim: int = key(help="feed-forward width (1.3B: 8960, 14B: 13824)")
    heads: int = key(help="attention heads (1.3B: 12, 14B: 40)")
    blocks: int = key(help="transformer blocks (1.3B: 30, 14B: 40)")
    freq_dim: int = key(256, help="width of the timestep sinusoid")


@dataclass(frozen=True, kw_only=True)
class Flow:
    """The one flow-matching schedule of all networks: sigma = timestep / 1000."""

    shift: float = key(5.0, help="timestep shift of training draws and of the warped step list")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and gradient clipping of one network. Schedules count this network's own updates."""

    lr: float = key(help="peak learning rate")
    beta1: float = key(0.0, help="AdamW beta1 (the release: 0)")
    beta2: float = key(0.999, help="AdamW beta2")
    weight_decay: float = key(0.01, help="decoupled weight decay")
    clip_norm: float = key(10.0, help="global gradient norm above which gradients are scaled down")
    schedule: str = key("constant", help="learning rate over the stage's updates", choices=("constant", "cosine"))
    warmup: int = key(0, help="updates of linear warm-up")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The user states the global batch; accumulation = global / (ranks x micro) is derived."""

    global_size: int = key(help="samples an update sees over all ranks and micro-batches")
    micro_size: int = key(1, help="samples a rank runs at once")


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Sharded fp32 moving average of the trained network."""

    decay: float = key(0.99, help="weight of the old average at each update; 0 turns the average off")
    start_update: int = key(0, help="updates of the network before the average is created")


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Segment-by-segment generation with the KV cache."""

    steps: list[int] = key(lambda: [1000, 750, 500, 250], help="denoising steps before the shift warps them")
    first_steps: list[int] = key(
        list, help="denoising steps of the first segment, which has nothing to attend to; empty: those of steps"
    )
    total_frames: int = key(
        0, help="latent frames of a training rollout; the last video.latent_frames are scored; 0: no more than those"
    )
    exit_groups: int = key(1, help="independent exit-step draws a global batch is split into")
    kv_grad: str = key(
        "detached",
        help="whether gradient flows into cached keys and values of earlier segments",
        choices=("detached", "leaky"),
    )
    context_timestep: float = key(0.0, help="timestep of the context pass; 0 caches the clean segment")
    window_frames: int = key(0, help="latent frames attention may see, the current segment included; 0 is all")
    sink_frames: int = key(0, help="first latent frames that a sliding window never drops")


@dataclass(frozen=True, kw_only=True)
class Dmd:
    """Distribution matching of the generator and its critic (stage kind dmd)."""

    guidance: float = key(3.0, help="g in real = cond + g (cond - uncond); CFG weight g + 1")
    min_timestep: float = key(20.0, help="smallest timestep at which the scores are compared")
    max_timestep: float = key(980.0, help="largest timestep at which the scores are compared")
    score_schedule: str = key(
        "none",
        help="none: scores are compared at any timestep; lower: none cleaner than what the rollout's exit step leaves; "
        "both: in the exit step's own interval",
        choices=("none", "lower", "both"),
    )
    critic_updates: int = key(5, help="critic updates after each generator update")
    critic_optimizer: Optimizer = key(lambda: Optimizer(lr=4e-7), help="AdamW of the critic")


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """Foresight distillation (Video-Mirai section 3) of the dmd stage. What the two few-step starts may have is their
    own section (StageForesight), but for preset, offsets, depth and predictor_blocks, which they take from here."""

    weight: float = key(0.2, help="lambda of the dmd stage; 0 is bit-identical to no foresight")
    start_cycle: int = key(0, help="first cycle of the dmd stage with foresight; before it the run is the baseline's")
    preset: str = key(
        "paper",
        help="paper: depth counts executed blocks, fp32 fusion, plain predictor, replay after "
        "every critic update; release: the authors' shipped arithmetic",
        choices=("paper", "release"),
    )
    offsets: list[int] = key(lambda: [0, 1], help="segments ahead whose features are averaged into the target")
    depth: float = key(0.5, help="relative depth of the generator state and of the encoder feature")
    predictor_blocks: int = key(3, help="DiT blocks of the predictor")
    encoder_attention: str = key(
        "bidirectional",
        help="what the encoder may see; causal is the control without future",
        choices=("bidirectional", "causal"),
    )
    targets: str = key(
        "rollout",
        help="shuffled pairs each state with another sample's target: a control",
        choices=("rollout", "shuffled"),
    )
    optimizer: Optimizer = key(lambda: Optimizer(lr=2e-6), help="AdamW of the predictor")


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Causal consistency distillation (stage kind consistency)."""

    points: int = key(48, help="points of the Euler grid that neighbouring timesteps are taken from")
    guidance: float = key(3.0, help="w in v = uncond + w (cond - uncond) of the AR teacher")


@dataclass(frozen=True, kw_only=True)
class Ode:
    """Causal ODE distillation (stage kind ode): the AR teacher's trajectories from noise to video."""

    points: int = key(48, help="Euler steps; rollout.steps must lie on this grid, their states are kept")
    guidance: float = key(6.0, help="w in v = uncond + w (cond - uncond) of the AR teacher")
    shard_size: int = key(64, help="trajectories a file: what is lost when the making is killed")


@dataclass(frozen=True, kw_only=True)
class StageForesight:
    """Foresight while a few-step start is distilled (kinds ode and consistency): the target is the ground-truth future
    (Video-Mirai D.4). The encoder is the stage's teacher."""

    weight: float = key(0.0, help="lambda of this stage; 0 is bit-identical to no foresight")
    fusion: str = key(
        "frames",
        help="none: a target an offset; frames: a target an offset, averaged over a segment's frames (the paper's best "
        "here); offsets: one target, averaged over offsets as in dmd",
        choices=("none", "frames", "offsets"),
    )
    encoder_attention: str = key(
        "bidirectional",
        help="what the encoder may see; causal is the control without future",
        choices=("bidirectional", "causal"),
    )
    targets: str = key(
        "truth",
        help="shuffled pairs each state with another sample's target: a control",
        choices=("truth", "shuffled"),
    )
    optimizer: Optimizer = key(lambda: Optimizer(lr=2e-6), help="AdamW of this stage's predictor")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Whether a stage's start is fit to be trained further; judged before the stage begins (evaluate/gate.py).

    Bounds are [low, high]: in multiples of the median of clean clips where there are some, else absolute
    (config/gates.py, which also has the defaults).
    """

    clips: int = key(0, help="clips of fixed prompts that are rolled out and measured; 0: no gate")
    boundary_jump: list[float] = key(list, help="bounds of the largest step across a segment boundary; empty: default")
    motion: list[float] = key(list, help="bounds of the mean change from frame to frame; empty: default")
    saturation: list[float] = key(list, help="bounds of the spread of a clip's latents; empty: default")
    failing: float = key(0.25, help="share of the clips that may be outside the bounds of a measure")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the pipeline; stages run in the order they are written."""

    kind: str = key(
        help="what is trained: bidirectional teacher; AR teacher that sees the past clean (teacher_forcing) or at its "
        "own noise levels (diffusion_forcing); few-step start by consistency or by ode; dmd",
        choices=("bidirectional", "teacher_forcing", "diffusion_forcing", "consistency", "ode", "dmd"),
    )
    parent: str = key(
        "", help="earlier stage, or entry of weights, that the trained network starts from; empty: random weights"
    )
    teacher: str = key(
        "",
        help="stage or weights of the real score and foresight encoder, and of the critic's start (kind dmd); of the "
        "encoder alone (kinds ode and consistency with foresight)",
    )
    critic: str = key("", help="stage or weights that the critic starts from instead of the teacher's (kind dmd)")
    gate: Gate = key(Gate, help="what the parent must be fit for before the stage begins")
    cycles: int = key(help="cycles to run: one update, or for dmd one generator and all critic updates")
    batch: Batch = key(help="batch of every update of the stage")
    optimizer: Optimizer = key(help="AdamW of the trained network (kind dmd: the generator)")
    ema: Ema = key(Ema, help="moving average of the trained network; kind consistency: its target")
    prompt_dropout: float = key(0.0, help="fraction of samples trained on the empty prompt, which guidance needs")
    trajectories: int = key(0, help="trajectories that an ode stage makes of its parent first; 0: data.ode_pairs")
    foresight: StageForesight = key(StageForesight, help="foresight of a few-step start (kinds ode and consistency)")
    context_noise: float = key(
        0.0, help="highest unshifted timestep, of 1000, that teacher forcing noises the past to; 0 keeps it clean"
    )
    overrides: list[str] = key(
        list, help="overrides (section.key=value) for this stage alone, such as video.frames_per_segment=1"
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How networks are sharded, read by plan.shards, which planner and run share; and what computes what."""

    replicas: int = key(1, help="HSDP replicas; ranks / replicas shard each network")
    compute_dtype: str = key(
        "bfloat16",
        help="dtype of gathered parameters and activations; masters and reductions are fp32",
        choices=("bfloat16", "float32"),
    )
    unit: str = key("block", help="what FSDP gathers at a time", choices=("block", "network"))
    reshard_after_forward: bool = key(True, help="free gathered parameters after each forward")
    recompute: str = key(
        "block",
        help="block: keep only block inputs for backward; selective: and what attention gave, which is not computed "
        "again; none: keep everything",
        choices=("block", "selective", "none"),
    )
    sync_every_micro_batch: bool = key(
        False, help="reduce gradients after each micro-batch (less memory) or the last one only"
    )
    over_memory: str = key(
        "refuse",
        help="what a run does at its start where `mirai plan` predicts more memory than the device has",
        choices=("refuse", "warn"),
    )
    attention: str = key(
        "auto",
        help="what computes dense attention; auto: the fastest that is found exact on this machine; sdpa: torch's own "
        "choice, cudnn and sdpa-...: one of torch's kernels; flash: the newest FlashAttention package",
        choices=("auto", "sdpa", "cudnn", "sdpa-flash", "sdpa-efficient", "flash", "xformers"),
    )
    segment_attention: str = key(
        "auto",
        help="what computes attention over segments, in teachers that train in one pass; dense: calls of "
        "parallel.attention, segment by segment; flex: FlexAttention, one call; prefix: calls over prefixes, joined "
        "by fused kernels",
        choices=("auto", "dense", "flex", "prefix"),
    )
    kernels: str = key(
        "auto",
        help="what computes norms, rotary positions, gates and the foresight head, and joins attention's parts; fused: "
        "Triton kernels that move each tensor once; auto: those, where they are found exact on this machine, which "
        "CPUs cannot run (but in Triton's interpreter, TRITON_INTERPRET=1: fused takes them there, for checks)",
        choices=("auto", "reference", "fused"),
    )
    certificates: str = key(
        "prefer",
        help="what needs a certificate of `mirai bench kernels --certify`; prefer: fused kernels, and of attention "
        "without one is warned; require: both, or the run ends; ignore: nothing; fused kernels in Triton's interpreter "
        "have none and need none",
        choices=("ignore", "prefer", "require"),
    )
    certificate_folder: str = key(
        "runs/certificates", help="folder that certificates are read from, below the working directory or absolute"
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Committed checkpoints of the run."""

    every_cycles: int = key(help="cycles between saves; the last cycle always saves")
    keep: int = key(2, help="newest complete checkpoints kept per stage")


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms of one DMD stage: the same start, data and draws, each with its own overrides, for each seed."""

    stage: str = key("", help="dmd stage that the arms and seeds are trained in; empty: the last one")
    seeds: list[int] = key(lambda: [1], help="training seeds; the unit of every comparison")
    arms: dict[str, list[str]] = key(
        lambda: {"foresight": []}, help="arm name -> overrides (section.key=value) of this recipe"
    )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """What the report measures."""

    samples: int = key(64, help="videos per arm and seed from which quality is measured")
    probe_clips: int = key(256, help="rollouts whose states the future-readout probe is trained on")
    probe_updates: int = key(300, help="updates of each probe decoder")
    grid_every: int = key(
        0,
        help="cycles of a dmd stage between sample grids of fixed prompts and noise: generator, and what teacher and "
        "critic make of its samples; 0: only at the end",
    )
    teacher_steps: int = key(20, help="Euler steps of the bidirectional teacher's own samples")


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """When the measures of a dmd stage say that it is dying (mirai_dist/observe/alarms.py); a limit of 0 is off."""

    warmup_cycles: int = key(5, help="cycles before any alarm looks; what is relative to the start is relative to them")
    window_cycles: int = key(10, help="cycles whose mean is compared with a limit, and that an alarm takes to clear")
    on_alarm: str = key(
        "warn",
        help="warn: say it and go on; stop: save, and end the run with exit code 20",
        choices=("warn", "stop"),
    )
    saturation: float = key(
        1.5, help="latents/all/std relative to its start, or the inverse: above 1; over-saturated or washed out"
    )
    mean_drift: float = key(0.4, help="largest drift/mean: channel means off the teacher's, in its standard deviations")
    motion: float = key(0.5, help="least motion/relative: frame-to-frame difference relative to the teacher's")
    critic_lag: float = key(
        1.25, help="largest critic_error/to_gaussian; above 1 the critic knows less than the samples' mean and variance"
    )
    moved: float = key(0.5, help="least fraction of the weights of a trained network that its updates change")
    score_scale: float = key(2.0, help="largest score/guided_std: spread of the teacher's x0 with guidance and without")
    timesteps: float = key(6.0, help="standard deviations that drawn score timesteps may be off their schedule")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: what is trained, on what, how it is sharded and what is measured."""

    name: str = key(help="name of the run; the default run directory is runs/<name>")
    seed: int = key(1, help="seed of every draw outside the study's own seeds")
    video: Video = key(help="latent video and segments")
    data: Data = key(Data, help="data sets")
    world: World = key(World, help="procedural video world")
    text: Text = key(help="text encoder")
    vae: Vae = key(Vae, help="video autoencoder")
    weights: dict[str, Weights] = key(dict, help="published weights that stages start from, by name")
    teacher: Network = key(help="bidirectional teacher: real score and foresight encoder")
    generator: Network = key(help="causal few-step generator, and the AR teacher it starts from")
    critic: Network = key(help="fake score")
    flow: Flow = key(Flow, help="flow-matching schedule")
    rollout: Rollout = key(Rollout, help="causal rollout")
    dmd: Dmd = key(Dmd, help="distribution matching")
    foresight: Foresight = key(Foresight, help="foresight distillation")
    consistency: Consistency = key(Consistency, help="few-step start by consistency distillation")
    ode: Ode = key(Ode, help="few-step start by ODE distillation")
    stages: dict[str, Stage] = key(help="the pipeline, in order")
    parallel: Parallel = key(Parallel, help="sharding and precision")
    checkpoint: Checkpoint = key(help="checkpoints")
    study: Study = key(Study, help="arms and seeds of a dmd stage")
    alarms: Alarms = key(Alarms, help="alarms on the health of a dmd stage")
    evaluate: Evaluate = key(Evaluate, help="report")

    @property
    def study_stage(self) -> str:
        """Name of the stage that the study's arms and seeds are trained in; empty where no stage is of kind dmd."""
        dmd = [name for name, stage in self.stages.items() if stage.kind == "dmd"]
        return self.study.stage or (dmd[-1] if dmd else "")
