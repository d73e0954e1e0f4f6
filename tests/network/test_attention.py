"""All of AN's scales in one pass of the encoder give what one pass per scale gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cosa_fast.config.schema import ModelConfig, TeacherConfig
from cosa_fast.method.assignment import AssignmentNetwork
from cosa_fast.network.attention import (
    KERNELS,
    PackedAttention,
    Segments,
    attend_by_group,
    embed,
    pack,
    run_packed,
    segments_of,
)
from cosa_fast.network.attention_backends import refusal
from cosa_fast.network.build import build_model
from cosa_fast.network.encoder import Encoder, create_backbone

CPU = torch.device("cpu")
SMALL = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 with norms": {"qk_norm": True, "scale_attn_norm": True, "init_values": 0.5, "pre_norm": True},
    "vit_tiny_patch16_224 without prefix": {"class_token": False, "global_pool": "avg"},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 8},
    "deit_tiny_distilled_patch16_224": {},
}


def dense_mask(segments: Segments) -> Tensor:
    """(T, T) bool: which tokens see each other."""
    position = torch.arange(int(segments.starts[-1]))
    image = (position[:, None] >= segments.starts[None, 1:]).sum(1)
    return image[:, None] == image[None]


def sizes(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, *side, generator=generator) for side in ((64, 64), (32, 40), (96, 80))]


def random_norms(network: torch.nn.Module) -> None:
    """Norms and scales away from their initial ones, or leaving them out would not show."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_gives_the_features_of_several(variant: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(create_backbone(variant.split()[0], {**SMALL, **VARIANTS[variant]}), -2).eval()
    random_norms(encoder)
    names = set(encoder.state_dict())
    with torch.no_grad():
        apart = [encoder(batch) for batch in sizes()]
        assert encoder.attend("packed") is None
        together = encoder.forward_packed(sizes())
        again = [encoder(batch) for batch in sizes()]
    assert set(encoder.state_dict()) == names
    for expected, found, unpacked in zip(apart, together, again, strict=True):
        for a, b, c in zip(expected, found, unpacked, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
            assert torch.equal(c, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_blocks_are_those_of_timm_under_a_dense_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", SMALL).eval().to(dtype)
    embedded = [embed(backbone, batch.to(dtype)) for batch in sizes()]
    segments = segments_of(tuple((len(e), e.shape[1]) for e in embedded), "packed", CPU)
    with torch.no_grad():
        tokens = torch.cat([e.flatten(0, 1) for e in embedded])[None]
        for block in backbone.blocks:
            tokens = block(tokens, attn_mask=dense_mask(segments))
        expected = backbone.norm(tokens)[0]
        assert pack(backbone, "packed") is None
        found, _ = run_packed(backbone, embedded, segments, 0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(torch.cat([f.flatten(0, 1) for f in found]), expected, rtol=tolerance, atol=tolerance)


def test_segments_say_where_each_image_begins() -> None:
    segments = segments_of(((2, 3), (1, 5)), "packed", CPU)
    assert segments.starts.tolist() == [0, 3, 6, 11]
    assert segments.starts.dtype == torch.int32
    assert segments.longest == 5


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assignments_do_not_depend_on_the_attention(flip: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ModelConfig(
        backbone="vit_tiny_patch16_224", weights="none", arguments=SMALL, aux_layer=-2, decoder_width=16
    )
    online = build_model(model, 5)
    random_norms(online)
    networks = [AssignmentNetwork(online.to(dtype), TeacherConfig(flip=flip)) for _ in range(2)]
    networks[1].compute.encoder.attend("packed")
    labels = torch.tensor([[1.0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    expected, found = (network.assign(network.forward(sizes()[0]), labels, valid) for network in networks)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    for a, b in zip(expected.seg_logits, found.seg_logits, strict=True):
        assert (a - b).norm() <= tolerance * a.norm()
    assert len(found.confidence) == 2  # M' and M†'
    for a, b in zip(expected.confidence, found.confidence, strict=True):
        assert (a - b).abs().mean() < tolerance
    blocks = networks[1].master.encoder.backbone.blocks
    assert all(isinstance(block.attn, PackedAttention) for block in blocks)
    assert not any(isinstance(block.attn, PackedAttention) for block in online.encoder.backbone.blocks)


def test_only_sizes_that_come_again_are_kept() -> None:
    """What a captured step may read stays; an evaluation sees hundreds of sizes."""
    encoder = Encoder(create_backbone("vit_tiny_patch16_224", SMALL), -1).eval()
    encoder.attend("packed")
    with torch.no_grad():
        encoder.forward_packed([torch.zeros(1, 3, 8, 8)])
        for side in range(16, 48, 8):
            encoder.forward_packed([torch.zeros(1, 3, 8, side)], keep=False)
    assert {groups: segments.starts.tolist() for groups, segments in encoder._segments.items()} == {((1, 2),): [0, 2]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["varlen", "xformers"])
def test_kernels_agree(kind: str) -> None:
    device = torch.device("cuda")
    if (reason := refusal(kind, device, torch.bfloat16)) is not None:
        pytest.skip(reason)
    segments = segments_of(((4, 785), (4, 197), (4, 1765)), kind, device)
    torch.manual_seed(0)
    qkv = torch.randn(3, int(segments.starts[-1]), 12, 64, device=device)
    expected = attend_by_group(*qkv, segments)
    found = KERNELS[kind](*qkv.bfloat16(), segments)
    assert (found - expected).abs().max() < 0.02
