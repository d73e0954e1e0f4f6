"""Kernels for attention by name: the same features and gradients by each, the order in which a device's are tried, and
one line where one cannot run."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import varlen

from cosa_fast.config.schema import ModelConfig
from cosa_fast.errors import UserError
from cosa_fast.evaluation.inference import forward_scales
from cosa_fast.network import attention_backends, attention_choice
from cosa_fast.network.attention_backends import NAMED, ORDERS, any_size, architecture, refusal
from cosa_fast.network.attention_choice import check_attention, choose_attention
from cosa_fast.network.build import build_model
from cosa_fast.network.encoder import Encoder, create_backbone

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF, FULL = torch.bfloat16, torch.float32
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
ON_GPU = ("cudnn", "efficient", "varlen", "xformers")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
ANYWHERE = ["flash", "packed"]
SOMEWHERE = [*ANYWHERE, *(pytest.param(kind, marks=[pytest.mark.gpu, GPU]) for kind in ON_GPU)]


def vit(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(create_backbone(name, SMALL | arguments), -2)


def seen(encoder: Encoder, device: torch.device = CPU) -> list[Tensor]:
    """F and F† of two images, and the gradients of all parameters."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 40, 24, generator=generator).to(device, next(encoder.parameters()).dtype)
    features = [feature for feature in encoder(images) if feature is not None]
    weights = [torch.randn(feature.shape, generator=generator).to(feature) for feature in features]
    total = sum((feature * weight).sum() for feature, weight in zip(features, weights, strict=True))
    assert isinstance(total, Tensor)
    return [*features, *torch.autograd.grad(total, [p for p in encoder.parameters() if p.requires_grad])]


def by_hand(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """(T, heads, d): softmax within each image."""
    parts = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q, k, v = (part[first:last].transpose(0, 1) for part in (query, key, value))
        parts.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's and xformers' kernels for a GPU, by hand on any device."""

    def varlen_attn(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, *longest: int) -> Tensor:
        assert torch.equal(starts, ends)
        assert longest == (int(starts.diff().max()),) * 2
        return by_hand(query, key, value, starts)

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
        images, length = query.shape[:2]
        starts = torch.arange(0, images * length + 1, length) if attn_bias is None else attn_bias
        return by_hand(*(part.flatten(0, 1) for part in (query, key, value)), starts).unflatten(0, (images, length))

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(lengths: list[int], device: torch.device) -> Tensor:
            return torch.tensor([0, *lengths], device=device).cumsum(0)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    for name in ("xformers", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)


@pytest.mark.parametrize("kind", SOMEWHERE)
def test_every_kernel_gives_the_same_features_and_gradients(kind: str) -> None:
    on_gpu = kind in ON_GPU
    device, dtype = (CUDA, HALF) if on_gpu else (CPU, FULL)
    if (reason := refusal(kind, device, dtype)) is not None:
        pytest.skip(reason)
    encoder = vit(qk_norm=True).to(device, dtype)
    names = list(encoder.state_dict())
    expected = seen(encoder, device)
    choose_attention("model.attention", kind, encoder, learns=True)
    assert encoder.attention == kind
    assert list(encoder.state_dict()) == names
    copied = copy.deepcopy(encoder)
    for network in (encoder, copied):
        for a, b in zip(seen(network, device), expected, strict=True):
            assert (a - b).norm() <= (0.03 if on_gpu else 1e-5) * b.norm() + 1e-6
    assert encoder.attend("sdpa") is None
    assert all(torch.equal(a, b) for a, b in zip(seen(encoder, device), expected, strict=True))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("kind", ["varlen", "xformers"])
@pytest.mark.parametrize("arguments", [{}, {"qk_norm": True, "scale_attn_norm": True}])
def test_kernels_of_a_gpu_are_called_with_what_they_want(kind: str, arguments: dict[str, Any]) -> None:
    """For images of one size, with gradients, and for several sizes packed."""
    encoder = vit(**arguments)
    sizes = [torch.randn(2, 3, *side) for side in ((32, 32), (16, 24))]
    expected = seen(encoder)
    with torch.no_grad():
        apart = [encoder(images)[0] for images in sizes]
    assert encoder.attend(kind) is None
    for a, b in zip(seen(encoder), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        together = [features for features, _ in encoder.forward_packed(sizes)]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_another_kernel_is_another_graph() -> None:
    """Compiled blocks share their code: torch would go on with the kernel of the first one."""
    operators: list[set[str]] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        operators.append({str(node.target) for node in graph.graph.nodes})
        return graph

    backend = aot_autograd(fw_compiler=compiler)
    networks = [vit().eval() for _ in range(2)]
    networks[1].attend("flash")
    for module in networks[1].backbone.blocks:
        module.attn.backend = torch.nn.attention.SDPBackend.MATH  # the other one that a CPU has
    for network in networks:
        for block in network.backbone.blocks:
            block.compile(dynamic=False, backend=backend)
        with torch.no_grad():
            network(torch.zeros(1, 3, 32, 32))
    torch._dynamo.reset()
    assert any("flash_attention" in name for name in operators[0])
    assert all(not any("flash_attention" in name for name in found) for found in operators[1:])
    assert len(operators) == 2


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "reason"),
    [
        *((kind, CPU, HALF, "needs a GPU, this run computes on cpu") for kind in ON_GPU),
        *((kind, CUDA, FULL, "run.precision=bf16") for kind in ("cudnn", "flash", "varlen")),
        ("cudnn", CUDA, HALF, "needs cuDNN 9.15.1 or later, this torch has 9.10.2"),
        ("xformers", CUDA, HALF, r"xformers.ops cannot be imported \(.*\); install -c constraints"),
        ("varlen", CUDA, HALF, r"torch.nn.attention.varlen cannot be imported \(.*\); install torch>=2.10"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line_with_the_remedy(
    kind: str, device: torch.device, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    for name in ("xformers.ops", "torch.nn.attention.varlen"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"^model.attention={kind}: .*{reason}.*; set it to auto or sdpa$") as caught:
        check_attention("model.attention", kind, device, dtype)
    assert "\n" not in str(caught.value)


def test_what_runs_anywhere_is_not_refused() -> None:
    for kind in ("auto", "sdpa", *ANYWHERE):
        check_attention("teacher.attention", kind, CPU, FULL)


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "reason"),
    [
        ("resnet10t", {}, "flash", "ResNet has no attention that a kernel could be named for"),
        ("test_efficientnet", {}, "packed", "EfficientNet has no attention"),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, "packed", r"needs a plain ViT .*, Eva is none"),
    ],
)
def test_backbones_that_cannot_attend_so_are_refused(
    name: str, arguments: dict[str, Any], kind: str, reason: str
) -> None:
    encoder = Encoder(create_backbone(name, arguments), -1)
    with pytest.raises(UserError, match=f"teacher.attention={kind}: {reason}.*; set it to auto or sdpa"):
        choose_attention("teacher.attention", kind, encoder, learns=False)
    choose_attention("teacher.attention", "auto", encoder, learns=False)
    assert encoder.attention == (None if name != "eva02_tiny_patch14_224" else "sdpa")


def test_rotary_attention_can_be_named_too() -> None:
    torch.manual_seed(0)
    encoder = Encoder(create_backbone("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}), -1).eval()
    images = torch.randn(1, 3, 28, 42)
    with torch.no_grad():
        expected = encoder(images)[0]
        choose_attention("model.attention", "flash", encoder, learns=True)
        torch.testing.assert_close(encoder(images)[0], expected)
    assert all(block.attn.backend == NAMED["flash"] for block in encoder.backbone.blocks)


def test_a_kernel_that_fails_on_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vit()
    monkeypatch.setattr(attention_choice, "refusal", lambda *_: None)
    with pytest.raises(UserError, match=r"model.attention=cudnn: cannot run here \(No viable backend"):
        choose_attention("model.attention", "cudnn", encoder, learns=True)
    assert encoder.attention == "sdpa"
    seen(encoder)


@pytest.mark.usefixtures("stand_ins")
def test_dropout_of_attention_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vit(attn_drop_rate=0.1)
    monkeypatch.setattr(attention_choice, "refusal", lambda *_: None)
    for kind in ("varlen", "xformers"):
        with pytest.raises(UserError, match=r"knows no dropout \(model.arguments.attn_drop_rate\)"):
            choose_attention("model.attention", kind, encoder, learns=True)
        choose_attention("teacher.attention", kind, encoder, learns=False)  # AN drops nothing


def test_a_switch_of_timms_own_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = vit()
    for block in encoder.backbone.blocks:
        block.attn.fused_attn = False
    with pytest.raises(UserError, match="TIMM_FUSED_ATTN"):
        choose_attention("model.attention", "flash", encoder, learns=False)


@pytest.mark.parametrize("found", ORDERS)
def test_auto_takes_the_first_of_the_order_that_works(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    works = ORDERS[found][-1]

    def fails(encoder: Encoder, _: bool) -> None:
        tried.append(str(encoder.attention))
        if encoder.attention != works:
            raise RuntimeError("No available kernel")

    monkeypatch.setattr(attention_choice, "architecture", lambda _: found)
    monkeypatch.setattr(attention_choice, "refusal", lambda *_: None)
    monkeypatch.setattr(attention_choice, "run_once", fails)
    encoder = vit()
    choose_attention("model.attention", "auto", encoder, learns=True)
    assert (tried, encoder.attention) == (list(ORDERS[found]), works)
    works = ""
    choose_attention("model.attention", "auto", encoder, learns=True)
    assert encoder.attention == "sdpa"


def test_architectures_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert architecture(CPU) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in {(8, 0): "sm_80", (8, 9): "sm_80", (9, 0): "sm_90", (10, 3): "sm_100"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert architecture(CUDA) == name
        assert name in ORDERS
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert architecture(CUDA) == "gfx942"
    assert attention_backends.refusal("cudnn", CUDA, HALF) == "is NVIDIA's"


def test_no_plan_is_made_for_the_sizes_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN keeps one for each size for good; the sizes of training are few."""
    arguments = {"backbone": "vit_tiny_patch16_224", "weights": "none", "arguments": SMALL, "decoder_width": 8}
    network = build_model(ModelConfig(**arguments, aux_layer=None), 3)
    allowed: list[bool] = []

    def attention(*inputs: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return F.softmax(inputs[0] @ inputs[1].mT, -1) @ inputs[2]

    monkeypatch.setattr("timm.layers.attention.F.scaled_dot_product_attention", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with torch.no_grad():
        for side in (24, 40):
            forward_scales(network, torch.zeros(1, 3, side, side), (1.0, 0.5), flip=True, seg_scales=())
    assert allowed == [False] * 8
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with pytest.raises(KeyError), any_size():
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
