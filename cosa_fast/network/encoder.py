"""The encoder (METHOD: Model): any timm backbone, made to give F and F† on one token grid.

Vision transformers: F are the patch tokens after the final norm, F† those after an earlier block, before any norm.
Stride-16 CNNs: F is the final feature map, after the head convolution where the net has one (efficientnets: after
conv_head and its batch norm); F† is the output of an earlier stage of the same stride and has its own width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

import timm  # isort: skip

from cosa_fast.errors import UserError, hint
from cosa_fast.network.attention import KERNELS as PACKED
from cosa_fast.network.attention import Segments, embed, run_packed, segments_of
from cosa_fast.network.attention_backends import attending, use_attention
from cosa_fast.network.positions import resample_plainly
from cosa_fast.network.rotary import keep_rotary_positions

CNN_STRIDE = 16
_RESERVED_ARGUMENTS = ("pretrained", "num_classes", "features_only", "dynamic_img_size", "output_stride")
_REFUSALS = (TypeError, AssertionError, NotImplementedError)
# Side of the image, in tokens, that tells grid, widths and used parameters of a new backbone.
_PROBE_TOKENS = 4


def create_backbone(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """timm's model `name`: a ViT that takes any grid (`dynamic_img_size`), else a net with output stride 16.

    `arguments` go to timm.create_model. With `pretrained`, the classifier keeps its pre-training size, because only
    then timm loads strictly; its errors (no network, mismatch) pass through. UserError: unknown name, arguments that
    the model does not take or that are not the user's to set, or a net that can do neither.
    """
    for key in _RESERVED_ARGUMENTS:
        if key in arguments:
            raise UserError(f"model.arguments.{key}: cosa_fast sets this one itself; remove it")
    check_name(name)
    options = dict(arguments) | ({"pretrained": True} if pretrained else {"num_classes": 0})
    try:
        return timm.create_model(name, dynamic_img_size=True, **options)
    except _REFUSALS as error:
        if "dynamic_img_size" not in str(error):
            raise UserError(f"model.arguments: {name} does not take them: {error}") from error
    try:
        return timm.create_model(name, output_stride=CNN_STRIDE, **options)
    except _REFUSALS as error:
        # Nets that know output_stride, but not 16, say so in a bare assertion.
        if arguments and str(error) and "output_stride" not in str(error):
            raise UserError(f"model.arguments: {name} does not take them: {error}") from error
        raise UserError(
            f"model.backbone: {name} takes neither dynamic_img_size nor output_stride={CNN_STRIDE}; "
            "take a ViT with learned or rotary positions, or a ResNet, EfficientNet or ConvNeXt"
        ) from error


def check_name(name: str) -> None:
    """UserError with the nearest match unless timm has the model `name` (architecture, or architecture.tag)."""
    known = timm.list_models() + timm.list_pretrained()
    if name not in known:
        near = hint(name, known) or "; timm.list_models() lists them"
        raise UserError(f"model.backbone: timm {timm.__version__} has no model {name!r}{near}")


class Encoder(nn.Module):
    """F and F† of a timm backbone.

    `backbone`: from `create_backbone`; it is taken over: heads, pools and norms that F and F† do not depend on are
    removed (`removed` names them), other unused parameters and the position embedding are frozen, batch norm never
    leaves its stored statistics (its affine parameters still train). A norm that the backbone would apply only after
    pooling (`fc_norm`) is its final norm and is applied to the tokens.

    `aux_layer`: negative, None for no F†. ViT: block, counted from the end (-1 = last). CNN: stage among those with the
    stride of the grid, counted from the end; further back means the earliest of them. `aux_name` names what was taken.

    `checkpoint_blocks`: in training mode keep only what the blocks (CNN: the blocks of each stage) receive, and compute
    their insides again in the backward pass: less memory for one more forward pass, and the same gradients.

    `attention`: the kernel that `attend` chose; None for a backbone without attention.

    `plain_positions`: interpolate the position embedding without antialiasing (network/positions.py).

    Attributes: stride (pixels per token), width (channels of F), width_aux (of F†, or None).
    UserError: aux_layer out of range; a backbone whose grid is not as expected, or that cannot recompute its blocks or
    resample its positions so.
    """

    backbone: Any

    def __init__(
        self,
        backbone: nn.Module,
        aux_layer: int | None,
        checkpoint_blocks: bool = False,
        plain_positions: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.plain_positions = plain_positions
        if plain_positions:
            resample_plainly(backbone)
        self.checkpoint_blocks = False
        self.attention: str | None = "sdpa" if attending(backbone) else None
        self._segments: dict[tuple[tuple[int, int], ...], Segments] = {}
        self.is_vit = _is_vit(backbone)
        self.stride = _patch_size(backbone) if self.is_vit else CNN_STRIDE
        self.prefix_tokens = int(getattr(backbone, "num_prefix_tokens", 0)) if self.is_vit else 0
        keep_rotary_positions(backbone)
        self.norm_was_pooled = self.is_vit and _apply_pooled_norm_to_tokens(backbone)
        levels = self._probe_levels()
        # Without F†, the last level is asked for and ignored: forward_intermediates wants one.
        self._level = len(levels) - 1 if aux_layer is None else self._choose_level(levels, aux_layer)
        self._has_aux = aux_layer is not None
        self.aux_name = self._level_name() if self._has_aux else None
        self.width, self.width_aux, self.removed = self._prune()
        position_embedding = getattr(backbone, "pos_embed", None)
        if isinstance(position_embedding, nn.Parameter):
            position_embedding.requires_grad_(False)
        if checkpoint_blocks:
            self._require_recomputation()
            self.checkpoint_blocks = True
        self.train(self.training)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, H, W), H and W multiples of `stride` → F (B, D, h, w), F† (B, D', h, w) or None.

        h = H / stride, w = W / stride. ValueError if a side is no multiple.
        """
        height, width = self._check_sides(images)
        if not self.is_vit:
            features, levels = self._run(images, [self._level])
            return features, levels[0] if self._has_aux else None
        tokens, levels = self._run(images, [self._level])
        grid = (height // self.stride, width // self.stride)
        features = _to_map(tokens[:, self.prefix_tokens :], grid)
        return features, _to_map(levels[0], grid) if self._has_aux else None

    def attend(self, kind: str) -> str | None:
        """Attend by the kernel `kind` (network/attention_backends.py) from now on; "packed", "varlen" and "xformers"
        also make `forward_packed` possible. Why not, where the backbone cannot: torch chooses a kernel then."""
        reason = use_attention(self.backbone, kind)
        self.attention = (kind if reason is None else "sdpa") if attending(self.backbone) else None
        self._segments = {}
        return reason

    @property
    def packs(self) -> bool:
        """Whether `forward_packed` is possible."""
        return self.attention in PACKED

    def forward_packed(self, images: Sequence[Tensor], keep: bool = True) -> list[tuple[Tensor, Tensor | None]]:
        """As forward, for batches of several sizes in one pass. keep: these sizes come again; how they divide the
        tokens is kept for good, as a captured step reads it."""
        for batch in images:
            self._check_sides(batch)
        grids = [(batch.shape[-2] // self.stride, batch.shape[-1] // self.stride) for batch in images]
        embedded = [embed(self.backbone, batch) for batch in images]
        groups = tuple((len(tokens), tokens.shape[1]) for tokens in embedded)
        segments = self._segments.get(groups) or segments_of(groups, str(self.attention), images[0].device)
        if keep:
            self._segments[groups] = segments
        final, levels = run_packed(self.backbone, embedded, segments, self._level)
        return [
            (
                _to_map(tokens[:, self.prefix_tokens :], grid),
                _to_map(level[:, self.prefix_tokens :], grid) if self._has_aux else None,
            )
            for tokens, level, grid in zip(final, levels, grids, strict=True)
        ]

    def train(self, mode: bool = True) -> "Encoder":
        """As nn.Module.train, but batch norm stays on its stored statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _check_sides(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"images: sides must be multiples of the patch size {self.stride}, got {height}x{width}")
        return height, width

    def _require_recomputation(self) -> None:
        """UserError unless the backbone can recompute its blocks, and does so where F and F† come from."""
        refusal = (
            f"model.checkpoint_blocks: {type(self.backbone).__name__} cannot recompute its blocks; set it to false, "
            "or take a ViT, ResNet, EfficientNet or ConvNeXt"
        )
        self.backbone.eval()  # random layers stay out of it
        try:
            self.backbone.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(refusal) from error
        with torch.enable_grad():
            features, _ = self(self.probe_image())
            called = _modules_called_by(lambda: torch.autograd.grad(features.sum(), list(_leaves(features))))
        if not called:
            raise UserError(refusal)

    def _run(self, images: Tensor, indices: list[int] | None) -> tuple[Tensor, list[Tensor]]:
        output_format = "NLC" if self.is_vit else "NCHW"
        if self.checkpoint_blocks:
            self.backbone.set_grad_checkpointing(self.training and torch.is_grad_enabled())
        return self.backbone.forward_intermediates(images, indices=indices, norm=False, output_fmt=output_format)

    def probe_image(self) -> Tensor:
        """A small image of zeros, (1, 3, H, W), of the type and on the device of the parameters."""
        reference = next(self.backbone.parameters())
        side = _PROBE_TOKENS * self.stride
        return torch.zeros(1, 3, side, side, dtype=reference.dtype, device=reference.device)

    def _probe_levels(self) -> list[Tensor]:
        self.backbone.eval()
        with torch.no_grad():
            features, levels = self._run(self.probe_image(), None)
        grid = (_PROBE_TOKENS, _PROBE_TOKENS)
        expected = features.ndim == 3 if self.is_vit else tuple(features.shape[2:]) == grid
        if not expected:
            name = type(self.backbone).__name__
            raise UserError(
                f"model.backbone: {name} gives no stride-{self.stride} grid; take a ViT, ResNet or EfficientNet"
            )
        return levels

    def _choose_level(self, levels: list[Tensor], aux_layer: int) -> int:
        if aux_layer >= 0:
            raise UserError(f"model.aux_layer={aux_layer}: count from the end (-1 is the last layer), or null for none")
        if not self.is_vit:
            same_grid = [index for index, level in enumerate(levels) if level.shape[-1] == _PROBE_TOKENS]
            if not same_grid:
                raise UserError("model.aux_layer: no stage of this backbone has the grid's stride; set it to null")
            return same_grid[max(len(same_grid) + aux_layer, 0)]
        if aux_layer < -len(levels):
            raise UserError(
                f"model.aux_layer={aux_layer}: the backbone has {len(levels)} blocks; take -{len(levels)} .. -1"
            )
        return len(levels) + aux_layer

    def _level_name(self) -> str:
        return f"blocks.{self._level}" if self.is_vit else f"stage {self._level}"

    def _prune(self) -> tuple[int, int | None, tuple[str, ...]]:
        """Widths of F and F†; removes or freezes what they do not depend on."""
        self.backbone.eval()
        with torch.enable_grad():
            features, features_aux = self(self.probe_image())
        used = _leaves(features) | (_leaves(features_aux) if features_aux is not None else set())
        removed = []
        for name, child in list(self.backbone.named_children()):
            parameters = list(child.parameters())
            if parameters and not any(parameter in used for parameter in parameters):
                setattr(self.backbone, name, nn.Identity())
                removed.append(name)
        for parameter in self.backbone.parameters():
            if parameter not in used:
                parameter.requires_grad_(False)
        width_aux = None if features_aux is None else features_aux.shape[1]
        return features.shape[1], width_aux, tuple(removed)


def _is_vit(backbone: nn.Module) -> bool:
    return hasattr(backbone, "num_prefix_tokens") and hasattr(backbone, "blocks") and hasattr(backbone, "patch_embed")


def _patch_size(backbone: Any) -> int:
    ratio = backbone.patch_embed.feat_ratio(as_scalar=False)
    if ratio[0] != ratio[1]:
        raise UserError(
            f"model.backbone: square patches are needed, {type(backbone).__name__} has {ratio[0]}x{ratio[1]}"
        )
    return int(ratio[0])


def _apply_pooled_norm_to_tokens(backbone: Any) -> bool:
    pooled = getattr(backbone, "fc_norm", None)
    if pooled is None or isinstance(pooled, nn.Identity) or not isinstance(backbone.norm, nn.Identity):
        return False
    backbone.norm, backbone.fc_norm = pooled, nn.Identity()
    return True


def _to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, h·w, D) → (B, D, h, w): a view, in channels_last order."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def _leaves(output: Tensor) -> set[Tensor]:
    """The parameters that `output` depends on, read off the autograd graph (no backward pass)."""
    leaves, seen, stack = set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


def _modules_called_by(action: Callable[[], object]) -> list[nn.Module]:
    """The modules, of any network, whose forward pass runs during `action`."""
    called: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
    try:
        action()
    finally:
        hook.remove()
    return called
