"""The architecture that a file of a whole network was made with, as far as its tensors and its settings tell."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from cosa_fast.config.schema import ModelConfig
from cosa_fast.network.reading import Weights
from cosa_fast.network.weights import is_of_release

# Width and depth of the plain ViTs, which all have 64 channels a head.
_VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}
_PATCH, _SIDE = 16, 224


def network_as_written(weights: Weights, given: ModelConfig) -> ModelConfig:
    """`given` with what the file tells for certain: the segmentation head and its width, whether there is an auxiliary
    layer and (by the file's settings) which, and how positions are resampled in a network of the release."""
    state = weights.state
    known: dict[str, Any] = {"weights": "none", "decoder": "aspp" if "decoder.c0.weight" in state else "largefov"}
    if "decoder.conv6.weight" in state:
        known["decoder_width"] = state["decoder.conv6.weight"].shape[0]
    if not {"aux_classifier.weight", "classifier_aux.weight"} & state.keys():
        known["aux_layer"] = None
    else:
        layer = weights.settings.get("aux_layer", given.aux_layer)
        known["aux_layer"] = layer if isinstance(layer, int) and layer < 0 else -3
    if is_of_release(state):
        known["position_resampling"] = "plain"
    return replace(given, **known)


def backbone_as_written(weights: Weights, given: ModelConfig) -> ModelConfig | None:
    """`given` with the plain ViT whose shapes the tensors have; None where they are those of no common one."""
    prefix = "encoder." if is_of_release(weights.state) else "encoder.backbone."
    state = {key.removeprefix(prefix): value for key, value in weights.state.items() if key.startswith(prefix)}
    size = _vit_size(state)
    side = _side(state)
    if size is None or side is None:
        return None
    patch = state["patch_embed.proj.weight"].shape[-1]
    arguments = {"img_size": side} if side != _SIDE else {}
    arguments |= {"patch_size": patch} if patch != _PATCH else {}
    return replace(given, backbone=f"vit_{size}_patch16_224", arguments=arguments)


def _vit_size(state: Mapping[str, Tensor]) -> str | None:
    kernel = state.get("patch_embed.proj.weight")
    if kernel is None or kernel.dim() != 4:
        return None
    width = kernel.shape[0]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    hidden = state.get("blocks.0.mlp.fc1.weight")
    plain = hidden is not None and tuple(hidden.shape) == (4 * width, width) and "blocks.0.attn.qkv.bias" in state
    # Layer scale, registers, normalised queries: other ViTs of the same size.
    plain = plain and not {"reg_token", "blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight", "norm_pre.weight"} & set(
        state
    )
    return _VITS.get((width, depth)) if plain else None


def _side(state: Mapping[str, Tensor]) -> int | None:
    """Pixels of the square image whose grid the position embedding has."""
    positions = state.get("pos_embed")
    if positions is None or positions.dim() != 3:
        return None
    tokens = positions.shape[1] - 1
    grid = math.isqrt(max(tokens, 0))
    return grid * state["patch_embed.proj.weight"].shape[-1] if grid and grid * grid == tokens else None
