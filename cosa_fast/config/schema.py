"""Every setting of a run: frozen dataclasses, one a section, and the checks that one setting alone cannot show.

Defaults are the paper's recipe on PASCAL VOC. `parsing.py` makes them of files and of what a user types.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from cosa_fast.data_pipeline.views.parameters import AugmentConfig
from cosa_fast.errors import UserError

# Kernels for attention: network/attention_backends.py.
Attention = Literal["auto", "sdpa", "cudnn", "flash", "efficient", "packed", "varlen", "xformers"]


def bounded(default: Any, *, low: float, high: float) -> Any:
    """A dataclass field whose number (or every number of whose tuple) must lie in [low, high]. Every number has both
    bounds, be they far: nothing absurd is to reach what computes with it."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class DataConfig(AugmentConfig):
    """Images, and with `AugmentConfig`'s settings their views. `mean` and `std` are those that the backbone was trained
    with. `labels`: label file (None: searched in `root`). `pack`: the training split's images in one file, as
    `prepare --pack` writes it (None: image files).

    `pseudo_labels`: the folder of masks that a standalone network learns from, as `predict --what cpl` writes it.

    `pipeline`: who decodes and augments (auto: DALI where it works, else torch; a resumed run keeps what it began
    with). `workers`: processes of the torch pipeline; threads of DALI, and of evaluation. `prefetch`: batches prepared
    ahead (torch: by each worker). `unreadable`: stop at an image that cannot be read, or skip it, which shows the next
    one of the set in its place."""

    format: Literal["voc", "coco", "folder", "synthetic"] = "voc"
    root: str = "data/VOCdevkit/VOC2012"
    train_split: str = "train_aug"
    val_split: str | None = "val"
    labels: str | None = None
    pack: str | None = None
    pseudo_labels: str | None = None
    classes: tuple[str, ...] | None = None
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    workers: int = bounded(8, low=0, high=256)
    prefetch: int = bounded(2, low=1, high=64)
    unreadable: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class ModelConfig:
    """The network. `architecture`: CoSA's own, or a standalone one of segmentation_models_pytorch that learns from
    pseudo-labels (CoSA-MS); of the other settings that one has `backbone`, the name of its encoder, `weights` and
    `arguments`. `weights`: "hub", "none" or a file. `arguments` go to timm.create_model, of a standalone one to the
    architecture. `aux_layer`: block of F†, counted from the end (None: no auxiliary head). `attention`: the kernel
    by which ON attends in training (auto: by the device, docs/performance.md). `position_resampling`: how a ViT's
    positions are interpolated to another grid than its own, as timm does it or without antialiasing, as the
    official release does. `decoder`: with a LargeFOV of `decoder_width` channels, or with SeCo's ASPP, which has
    neither width nor dilation to set. `head_start`: how heads begin, with logits near 0 (small), or as torch's
    layers do and the release's with them (uniform). `detach`: gradient switch of the guided CAM.
    `checkpoint_blocks`: on small GPUs ON's backbone computes its blocks again in the backward pass instead of
    keeping what is inside."""

    backbone: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    weights: str = "hub"
    arguments: dict[str, Any] = field(default_factory=dict)
    aux_layer: int | None = bounded(-3, low=-1000, high=-1)
    attention: Attention = "auto"
    position_resampling: Literal["antialiased", "plain"] = "antialiased"
    decoder: Literal["largefov", "aspp"] = "largefov"
    decoder_width: int = bounded(512, low=1, high=65536)
    decoder_dilation: int = bounded(5, low=1, high=1024)
    head_start: Literal["small", "uniform"] = "small"
    detach: Literal["none", "features", "weights", "both"] = "none"
    checkpoint_blocks: bool = False
    architecture: Literal["CoSA", "DeepLabV3Plus", "Segformer", "UPerNet"] = "CoSA"

    @property
    def standalone(self) -> bool:
        """Whether it is the network of CoSA-MS: one alone, without CAM and without AN."""
        return self.architecture != "CoSA"


@dataclass(frozen=True)
class TeacherConfig:
    """The assignment network (AN): its multi-scale forward, and the momentum m of its moving average (0: AN = ON).

    `aux_scales`: M†' of all scales, or of the last one alone, as in the release. `attention`: the kernel by which AN
    attends in training, as model.attention for ON; "packed", "varlen" and "xformers" run all scales of a ViT in one
    pass."""

    scales: tuple[float, ...] = bounded((1.0, 0.5, 1.5), low=0.1, high=8.0)
    flip: bool = True
    aux_scales: Literal["all", "last"] = "all"
    attention: Attention = "auto"
    momentum: float = bounded(0.9994, low=0.0, high=1.0)


@dataclass(frozen=True)
class ThresholdConfig:
    """Where a CAM becomes foreground: `dynamic` ξ and ξ† (eq. 6), `fixed` values, or a `band` whose inside is
    ignored. `grid`: of the confidences that are compared, that of the pixels (full), or first reduced to half of each
    side and enlarged again, as in the release (half)."""

    mode: Literal["dynamic", "fixed", "band"] = "dynamic"
    grid: Literal["full", "half"] = "full"
    value: float = bounded(0.45, low=0.001, high=0.999)
    value_aux: float = bounded(0.45, low=0.001, high=0.999)
    band: tuple[float, float] = bounded((0.25, 0.70), low=0.001, high=0.999)
    band_aux: tuple[float, float] = bounded((0.25, 0.70), low=0.001, high=0.999)
    queue_length: int = bounded(100, low=1, high=10**6)
    bins: int = bounded(256, low=8, high=65536)
    floor: float = bounded(0.05, low=0.0, high=0.9)
    clamp: tuple[float, float] = bounded((0.2, 0.9), low=0.001, high=0.999)
    smoothing: float = bounded(0.9, low=0.0, high=0.9999)


@dataclass(frozen=True)
class LossConfig:
    """Loss weights λ and the constants of each loss. A weight of 0 means that the loss is not computed at all.

    `s2c_padding`: whether s2c is a mean over padding as well, as in the release. `csc_vectors`: what csc compares, the
    CAM's probabilities beside a background channel of their own, or its raw logits."""

    cls: float = bounded(1.0, low=0.0, high=1e6)
    cls_aux: float = bounded(1.0, low=0.0, high=1e6)
    c2s: float = bounded(0.1, low=0.0, high=1e6)
    c2s_aux: float = bounded(0.1, low=0.0, high=1e6)
    s2c: float = bounded(0.05, low=0.0, high=1e6)
    csc: float = bounded(0.1, low=0.0, high=1e6)
    energy: float = bounded(0.0, low=0.0, high=1e6)
    reliability: Literal["perplexity", "none"] = "perplexity"
    foreground_weight: float | None = bounded(0.5, low=0.0, high=1.0)
    alpha: float = bounded(0.8, low=1e-3, high=0.999)
    beta: float = bounded(1.0, low=0.0, high=10.0)
    guidance: Literal["teacher", "truth", "noise"] = "teacher"
    s2c_temperature: float = bounded(0.01, low=1e-6, high=1e6)
    s2c_relu: bool = False
    s2c_padding: bool = False
    csc_vectors: Literal["probability", "logits"] = "probability"
    csc_epsilon: float = bounded(1.0, low=0.0, high=1e6)
    csc_temperature: float = bounded(0.5, low=1e-6, high=1e6)
    csc_scope: Literal["image", "batch"] = "image"
    csc_similarity: Literal["cosine", "dot"] = "cosine"
    energy_sigma_xy: float = bounded(100.0, low=1e-3, high=1e6)
    energy_sigma_rgb: float = bounded(15.0, low=1e-3, high=1e6)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, linear warm-up from `warmup_lr`, or from the share `warmup_ratio` of `lr` where that is given, then
    lr·(1 − t/iterations)^power with t counted from 0. `update_unused`: the segmentation head, which nothing asks for
    before co-training, is updated with gradients of 0 meanwhile, as in the release: it decays, and Adam counts its
    steps. `accumulate`: for small GPUs, each process computes its images of a batch in so many parts; the gradients
    stay those of the batch."""

    iterations: int = bounded(32000, low=1, high=10**9)
    batch_size: int = bounded(4, low=1, high=65536)
    accumulate: int = bounded(1, low=1, high=65536)
    cotrain_after: int = bounded(6000, low=0, high=10**9)
    lr: float = bounded(6e-5, low=0.0, high=1e30)  # too high a one shows in the loss; this bound is float32's
    head_multiplier: float = bounded(10.0, low=0.0, high=1e6)
    betas: tuple[float, float] = bounded((0.9, 0.999), low=0.0, high=0.99999)
    weight_decay: float = bounded(0.01, low=0.0, high=100.0)
    warmup: int = bounded(1500, low=0, high=10**9)
    warmup_lr: float = bounded(1e-6, low=0.0, high=100.0)
    warmup_ratio: float | None = bounded(None, low=0.0, high=1.0)
    update_unused: bool = False
    power: float = bounded(0.9, low=0.0, high=100.0)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation. `every`: iterations between evaluations (one always follows the last). `classes`: names that enter
    the mean besides background (None: all). `coexistence`: names of C-mIoU. `networks`: those evaluated as a run goes
    on (teacher: AN alone, where `select` does not compare both); at its end both are. `limit`: so many images in an
    evaluation, evenly spread over the set (None: all). `batch_size`: images of one size that are forwarded at once,
    fewer of very large ones (None: 16 on a GPU, 1 on a CPU). `protocol`: images at their own size, or squashed to the
    training crop as in the release (evaluation/protocol.py). `select`: the figure of the segmentation by which best.pt
    is chosen: AN's label-free one, or the better label-aware one of ON and AN, as in the release; none: the last
    evaluation's state is the best."""

    every: int = bounded(2000, low=1, high=10**9)
    scales: tuple[float, ...] = bounded((1.0, 0.5, 1.5, 0.75, 1.25), low=0.1, high=8.0)
    flip: bool = True
    protocol: Literal["native", "squashed"] = "native"
    select: Literal["label-free", "label-aware", "none"] = "label-free"
    classes: tuple[str, ...] | None = None
    coexistence: tuple[str, ...] = ()
    cam_step: float = bounded(0.05, low=0.005, high=0.5)
    networks: Literal["both", "teacher"] = "both"
    limit: int | None = bounded(None, low=1, high=10**9)
    batch_size: int | None = bounded(None, low=1, high=65536)


@dataclass(frozen=True)
class RunConfig:
    """One run: where it is written (`output`/`name`), its seed, its device, and what it logs and keeps.

    `engine`: the fused step, or the plain one it is held against. `backend`: of the kernels (auto: Triton on CUDA,
    plain PyTorch elsewhere). `precision`: of both networks' arithmetic (auto: bf16 on a GPU that has it). `tf32`: on a
    GPU fp32's convolutions round what they multiply to TF32, as torch does by itself; false: they do not. `compile`:
    blocks by torch.compile (auto: on CUDA). `capture`: steps in CUDA graphs (auto: on CUDA, where nothing needs the
    host).
    """

    name: str = "voc"
    output: str = "runs"
    seed: int = bounded(0, low=0, high=2**63 - 1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: Literal["fused", "plain"] = "fused"
    backend: Literal["auto", "triton", "reference"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    tf32: bool = True
    compile: Literal["auto", "on", "off"] = "auto"
    capture: Literal["auto", "off"] = "auto"
    threads: int | None = bounded(None, low=1, high=1024)
    log_every: int = bounded(20, low=1, high=10**9)
    checkpoint_every: int = bounded(1000, low=1, high=10**9)
    keep: int = bounded(2, low=1, high=10**6)


@dataclass(frozen=True)
class LogConfig:
    """Services that follow the run besides its folder (run/trackers.py): optional extras of the same names."""

    wandb: bool = False
    mlflow: bool = False


@dataclass(frozen=True)
class Config:
    """Everything that defines a run; written to the run's folder as config.yaml."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    threshold: ThresholdConfig = field(default_factory=ThresholdConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    log: LogConfig = field(default_factory=LogConfig)


def check_combinations(config: Config, where: str) -> None:
    """UserError, beginning with `where`, for values that do not go together, and for places that no run may use."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"{where}: {message}")

    for key, (low, high) in {
        "threshold.band": config.threshold.band,
        "threshold.band_aux": config.threshold.band_aux,
        "threshold.clamp": config.threshold.clamp,
    }.items():
        require(low <= high, f"{key} = [{low}, {high}] must be [low, high] with low <= high")
    require(
        config.optim.cotrain_after <= config.optim.iterations,
        f"optim.cotrain_after = {config.optim.cotrain_after} is past optim.iterations = {config.optim.iterations}; "
        "set both (cotrain_after = iterations trains classification only)",
    )
    require(
        not (config.threshold.mode == "band" and (config.loss.csc > 0 or config.loss.reliability == "perplexity")),
        "threshold.mode = band has no single threshold for a perplexity; set loss.csc=0 and loss.reliability=none, "
        "or threshold.mode to dynamic or fixed",
    )
    aux = config.loss.cls_aux if config.model.aux_layer is not None else 0.0
    require(
        config.optim.cotrain_after == 0 or config.loss.cls + aux > 0,
        "loss.cls and loss.cls_aux are both 0, so nothing is learned before optim.cotrain_after; set one of them",
    )
    require(len(config.teacher.scales) > 0, "teacher.scales is empty; give at least one scale, for example [1.0]")
    require(len(config.eval.scales) > 0, "eval.scales is empty; give at least one scale, for example [1.0]")
    name = PurePath(config.run.name)
    require(
        bool(name.parts) and not name.is_absolute() and ".." not in name.parts,
        f"run.name = {config.run.name!r} must name a folder below run.output, for example voc",
    )
    require(config.run.output != "", "run.output is empty; give a folder, for example runs")
    data = config.data
    for key, place in {
        "run.output": config.run.output,
        "run.name": config.run.name,
        "data.root": data.root,
        "data.labels": data.labels or "",
        "data.pack": data.pack or "",
        "data.pseudo_labels": data.pseudo_labels or "",
        "data.train_split": data.train_split,
        "data.val_split": data.val_split or "",
    }.items():
        longest = max((len(os.fsencode(part)) for part in PurePath(place).parts), default=0)
        require(longest <= 255, f"{key} holds a name of {longest} bytes; a file system takes at most 255")
        known_home = not place.startswith("~") or not os.path.expanduser(place).startswith("~")
        require(known_home, f"{key} = {place!r} begins with the name of no user; write the path out")
