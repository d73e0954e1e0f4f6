"""Position embeddings on other grids: as the official release reads them, held against a formula of this file's own."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import ModelConfig
from cosa_fast.errors import UserError
from cosa_fast.network.build import build_model
from cosa_fast.network.model import CoSANet

TINY = {"img_size": 224, "embed_dim": 24, "depth": 2, "num_heads": 2}


def make(resampling: str = "plain", backbone: str = "vit_tiny_patch16_224", **settings: object) -> CoSANet:
    torch.manual_seed(0)
    arguments = settings.pop("arguments", TINY if backbone == "vit_tiny_patch16_224" else {})
    config = ModelConfig(
        backbone=backbone,
        weights="none",
        arguments=arguments,  # type: ignore[arg-type]
        aux_layer=-2,
        decoder_width=8,
        position_resampling=resampling,  # type: ignore[arg-type]
    )
    return build_model(config, 3).eval()


def cubic(source: int, target: int) -> np.ndarray:
    """(target, source): each row the four taps of Keys' kernel, a = −0.75, borders repeated, no antialiasing."""
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d, a = abs(centre - tap), -0.75
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[row, min(max(tap, 0), source - 1)] += w
    return weights


def as_the_release(model: CoSANet, images: Tensor) -> Tensor:
    """F of a ViT whose positions are interpolated by `cubic`, written out from its parts."""
    vit = model.encoder.backbone
    tokens = vit.patch_embed.proj(images)
    height, width = tokens.shape[2:]
    own = int((vit.pos_embed.shape[1] - 1) ** 0.5)
    grid = vit.pos_embed[0, 1:].detach().double().numpy().reshape(own, own, -1)
    positions = np.einsum("yi,xj,ijd->dyx", cubic(own, height), cubic(own, width), grid)
    tokens = (tokens + torch.from_numpy(positions).float()).flatten(2).transpose(1, 2)
    tokens = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1), tokens], 1)
    tokens = vit.norm(vit.blocks(tokens))
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (height, width))


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (320, 480), (672, 672)])
@torch.no_grad()
def test_plain_positions_are_the_release_s(size: tuple[int, int]) -> None:
    model, images = make(), torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.encoder.backbone.pos_embed.mul_(20)  # of the size that training gives them
    expected = as_the_release(model, images)
    torch.testing.assert_close(model.encoder(images)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model).encoder(images)[0], expected, atol=1e-5, rtol=1e-5)
    other = make("antialiased")
    other.load_state_dict(model.state_dict())
    difference = (other.encoder(images)[0] - expected).abs().max()
    # Antialiasing acts where the grid shrinks, and its kernel is another one (a = −0.5) where it grows.
    assert bool(difference > 1e-3) == (size != (224, 224))


@torch.no_grad()
def test_packed_scales_have_the_same_positions() -> None:
    model = make()
    images = [torch.randn(1, 3, side, side) for side in (224, 112, 336)]
    expected = [model.encoder(each)[0] for each in images]
    assert model.encoder.attend("packed") is None
    for (features, _), wanted in zip(model.encoder.forward_packed(images), expected, strict=True):
        torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "backbone", ["vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224", "vit_base_patch16_clip_224"]
)
@torch.no_grad()
def test_prefix_tokens_of_other_vits_stay_in_place(backbone: str) -> None:
    """At a ViT's own grid nothing is resampled, so both ways agree."""
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 56 if "patch14" in backbone else 64}
    plain, usual = (make(way, backbone, arguments=arguments) for way in ("plain", "antialiased"))
    images = torch.randn(1, 3, arguments["img_size"], arguments["img_size"])
    torch.testing.assert_close(plain.encoder(images)[0], usual.encoder(images)[0], atol=1e-6, rtol=1e-6)


def test_nets_without_positions_take_either_and_other_vits_say_so() -> None:
    assert make(backbone="resnet18").encoder.plain_positions
    with pytest.raises(UserError, match=r"position_resampling=plain: needs a plain ViT .*, Eva is none"):
        make(backbone="eva02_tiny_patch14_224", arguments={"depth": 2})
