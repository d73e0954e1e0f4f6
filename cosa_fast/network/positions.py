"""How a ViT's position embedding comes to another grid than its own: bicubic, antialiased as timm does it, or plain as
ToCo, the official release of CoSA and what was built on them do."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cosa_fast.network import torchvision_compat  # noqa: F401  (must come before timm)

from timm.layers import resample_abs_pos_embed  # isort: skip
from timm.models.vision_transformer import VisionTransformer  # isort: skip

from cosa_fast.errors import UserError


def resample_plainly(backbone: nn.Module) -> None:
    """Make a ViT interpolate its positions without antialiasing. A net without position embedding stays as it is.

    UserError for an embedding that is not added as timm's VisionTransformer does it.
    """
    if not isinstance(getattr(backbone, "pos_embed", None), nn.Parameter):
        return
    if getattr(type(backbone), "_pos_embed", None) is not VisionTransformer._pos_embed:
        raise UserError(
            f"model.position_resampling=plain: needs a plain ViT (timm's VisionTransformer), {type(backbone).__name__} "
            "is none; set it to antialiased"
        )
    backbone._pos_embed = MethodType(_embed_positions, backbone)  # type: ignore[assignment]


def _embed_positions(backbone: Any, patches: Tensor) -> Tensor:
    """Patches (B, h, w, D) → tokens (B, N, D) with prefix tokens and positions."""
    positions = resample_abs_pos_embed(
        backbone.pos_embed,
        new_size=list(patches.shape[1:3]),
        old_size=list(backbone.patch_embed.grid_size),
        num_prefix_tokens=0 if backbone.no_embed_class else backbone.num_prefix_tokens,
        antialias=False,
    )
    tokens = patches.flatten(1, 2)
    prefix = [each.expand(len(tokens), -1, -1) for each in (backbone.cls_token, backbone.reg_token) if each is not None]
    if backbone.no_embed_class:
        tokens = torch.cat([*prefix, tokens + positions], dim=1)
    else:
        tokens = torch.cat([*prefix, tokens], dim=1) + positions
    return backbone.pos_drop(tokens)
