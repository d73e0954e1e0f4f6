"""F and F† of every backbone family, and what the encoder keeps of a backbone."""

import copy

import pytest
import torch
from torch import nn

from cosa_fast.errors import UserError
from cosa_fast.evaluation.inference import inference
from cosa_fast.network import rotary, torchvision_compat  # noqa: F401
from cosa_fast.network.encoder import Encoder, create_backbone

import timm  # isort: skip

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}
# name, arguments, patch size
VITS = [
    ("test_vit", {}, 16),
    ("test_vit3", {}, 16),  # attention pooling
    ("vit_base_patch16_224", SMALL, 16),
    ("vit_base_patch8_224", SMALL, 8),
    ("deit_tiny_distilled_patch16_224", SMALL, 16),  # two prefix tokens
    ("deit3_small_patch16_224", SMALL, 16),  # positions without the class token
    ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 112}, 14),
    ("vit_base_patch16_clip_224", SMALL, 16),  # norm before the blocks
    ("vit_base_patch16_siglip_224", SMALL, 16),  # no class token
    ("vit_small_patch16_dinov3", SMALL, 16),  # rotary positions only
    ("eva02_tiny_patch14_224", SMALL | {"img_size": 112}, 14),  # final norm after pooling
]
CNNS = [("tf_efficientnet_lite0", 1280, 112), ("resnet18", 512, 256), ("test_convnext", 64, 48)]


def make(name: str, arguments: dict | None = None, aux_layer: int | None = -3) -> Encoder:
    torch.manual_seed(0)
    return Encoder(create_backbone(name, arguments or {}), aux_layer)


@pytest.mark.parametrize(("name", "arguments", "patch"), VITS)
def test_vit_gives_both_maps_on_any_grid_and_every_trainable_parameter_gets_a_gradient(name, arguments, patch):
    encoder = make(name, arguments).train()
    features, features_aux = encoder(torch.randn(2, 3, 2 * patch, 5 * patch))
    assert encoder.stride == patch
    assert features.shape == (2, encoder.width, 2, 5)
    assert features_aux.shape == (2, encoder.width_aux, 2, 5)
    (features.square().sum() + features_aux.square().sum()).backward()
    idle = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle == []


@pytest.mark.parametrize(("name", "arguments", "patch"), VITS[:9])
def test_vit_features_are_timms_patch_tokens(name, arguments, patch):
    encoder = make(name, arguments).eval()
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, **arguments).eval()
    blocks = []
    plain.blocks[-3].register_forward_hook(lambda module, inputs, output: blocks.append(output))
    images = torch.randn(1, 3, *plain.patch_embed.img_size)
    with torch.no_grad():
        expected = plain.forward_features(images)
        features, features_aux = encoder(images)
    prefix = plain.num_prefix_tokens
    torch.testing.assert_close(features.flatten(2).mT, expected[:, prefix:])
    torch.testing.assert_close(features_aux.flatten(2).mT, blocks[0][:, prefix:])


def test_last_aux_layer_is_the_last_block_before_the_norm():
    encoder = make("test_vit", aux_layer=-1).eval()
    with torch.no_grad():
        features, features_aux = encoder(torch.randn(1, 3, 32, 32))
        normed = encoder.backbone.norm(features_aux.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(normed, features)


def test_norm_after_pooling_becomes_the_norm_of_the_tokens():
    encoder = make("eva02_tiny_patch14_224", SMALL).eval()
    features, _ = encoder(torch.randn(1, 3, 28, 28))
    assert encoder.norm_was_pooled
    torch.testing.assert_close(features.mean(1), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)


def test_position_embedding_is_frozen_and_the_class_token_kept():
    encoder = make("test_vit")
    assert not encoder.backbone.pos_embed.requires_grad
    assert encoder.backbone.cls_token.requires_grad


@pytest.mark.parametrize(("name", "width", "width_aux"), CNNS)
def test_cnn_gives_both_maps_at_stride_16(name, width, width_aux):
    encoder = make(name).train()
    features, features_aux = encoder(torch.randn(2, 3, 32, 80))
    assert (encoder.stride, encoder.width, encoder.width_aux) == (16, width, width_aux)
    assert features.shape == (2, width, 2, 5)
    assert features_aux.shape == (2, width_aux, 2, 5)
    (features.square().sum() + features_aux.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("aux_layer", "width"), [(-1, 320), (-2, 112), (-3, 112), (-9, 112)])
def test_cnn_aux_layer_counts_the_stages_of_the_grid_and_stops_at_the_earliest(aux_layer, width):
    assert make("tf_efficientnet_lite0", aux_layer=aux_layer).width_aux == width


def test_cnn_features_are_those_after_the_head_convolution():
    encoder = make("tf_efficientnet_lite0").eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[0], encoder.backbone.forward_features(images))


def test_batch_norm_keeps_its_statistics_in_training_while_its_affine_parameters_learn():
    encoder = make("resnet18").eval()
    images = torch.randn(4, 3, 32, 32) * 5 + 3
    before = copy.deepcopy(encoder.state_dict())
    still = encoder(images)[0]
    encoder.train()
    moving = encoder(images)[0]
    moving.sum().backward()
    torch.testing.assert_close(moving, still)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.weight.grad is not None and not norm.training for norm in norms)


def test_without_aux_layer_there_is_no_second_map():
    encoder = make("test_vit", aux_layer=None)
    assert (encoder.width_aux, encoder.aux_name) == (None, None)
    assert encoder(torch.randn(1, 3, 32, 32))[1] is None


@pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), ("resnet18", 16)])
def test_sides_that_are_no_multiple_of_the_patch_are_refused(name, patch):
    with pytest.raises(ValueError, match=rf"multiples of the patch size {patch}, got 32x40"):
        make(name)(torch.randn(1, 3, 32, 40))


@pytest.mark.parametrize(
    ("name", "arguments", "aux_layer", "message"),
    [
        ("vit_tiny_patch16_22", {}, -3, "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tinny", {}, -3, "no model 'vit_tinny' .did you mean 'vit_tiny_patch16_[0-9]*'"),
        ("vit_base_patch16_224.no_such_tag", {}, -3, "no model 'vit_base_patch16_224.no_such_tag'"),
        ("test_vit", {"dpeth": 2}, -3, "model.arguments: test_vit .* 'dpeth'"),
        ("resnet18", {"dpeth": 2}, -3, "model.arguments: resnet18 .* 'dpeth'"),
        ("test_vit", {"embed_dim": 50, "num_heads": 3}, -3, "model.arguments: test_vit"),
        ("test_vit", {"num_classes": 2}, -3, "model.arguments.num_classes"),
        ("test_vit", {}, -99, "model.aux_layer=-99: the backbone has 6 blocks"),
        ("test_vit", {}, 0, "model.aux_layer=0: count from the end"),
        ("mobilenetv3_small_050", {}, -3, "neither dynamic_img_size nor output_stride=16"),
        ("vgg11", {}, -3, "model.backbone: vgg11"),
        ("test_vit_relpos", {}, -3, "neither dynamic_img_size nor output_stride=16"),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (3, 3)}, -3, "gives no stride-16 grid"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(name, arguments, aux_layer, message):
    with pytest.raises(UserError, match=message) as caught:
        make(name, arguments, aux_layer)
    assert "\n" not in str(caught.value)


def test_copies_are_independent():
    encoder = make("test_vit")
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        twin.backbone.cls_token.add_(1)
    assert not torch.equal(twin.backbone.cls_token, encoder.backbone.cls_token)


def test_encoder_compiles_without_graph_breaks():
    encoder = make("test_vit", {"depth": 2}, -2).eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(compiled, encoder(images))


TINY_VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 2, "drop_path_rate": 0.3}
# name, arguments, where the blocks are
RECOMPUTED = [("vit_tiny_patch16_224", TINY_VIT, "blocks"), ("resnet10t", {}, "layer2")]


def gradients_and_calls(
    name: str, arguments: dict, blocks: str, checkpoint_blocks: bool
) -> tuple[dict[str, torch.Tensor], int]:
    """All gradients of a training step, and how often the first block's forward ran in it."""
    torch.manual_seed(0)
    encoder = Encoder(create_backbone(name, arguments), -2, checkpoint_blocks).train()
    calls = []
    encoder.backbone.get_submodule(blocks)[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    features, features_aux = encoder(torch.randn(2, 3, 64, 64))
    (features.square().sum() + features_aux.square().sum()).backward()
    named = encoder.named_parameters()
    return {key: parameter.grad for key, parameter in named if parameter.grad is not None}, len(calls)


@pytest.mark.parametrize(("name", "arguments", "blocks"), RECOMPUTED)
def test_recomputed_blocks_run_twice_and_give_the_same_gradients(name, arguments, blocks):
    """Also where blocks are random: the second run draws what the first one drew."""
    kept, once = gradients_and_calls(name, arguments, blocks, False)
    recomputed, twice = gradients_and_calls(name, arguments, blocks, True)
    assert (once, twice) == (1, 2)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[key], gradient) for key, gradient in kept.items())


def test_recomputed_blocks_may_be_compiled():
    gradients = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        backbone = create_backbone("vit_tiny_patch16_224", TINY_VIT | {"depth": 1})
        encoder = Encoder(backbone, None, checkpoint_blocks).train()
        for block in encoder.backbone.blocks:
            block.compile(dynamic=False, backend="aot_eager")
        torch.manual_seed(1)
        encoder(torch.randn(2, 3, 64, 64))[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("name", "arguments", "blocks"), RECOMPUTED)
def test_blocks_are_recomputed_in_training_only_also_after_an_evaluation(name, arguments, blocks):
    encoder = Encoder(create_backbone(name, arguments), -2, checkpoint_blocks=True).train()
    images = torch.randn(1, 3, 64, 64)
    encoder(images)
    assert encoder.backbone.grad_checkpointing
    with inference(encoder):
        encoder(images)
        assert not encoder.backbone.grad_checkpointing
    encoder(images)
    assert encoder.backbone.grad_checkpointing
    with torch.no_grad():
        encoder(images)
    assert not encoder.backbone.grad_checkpointing


def refuse(self: nn.Module, enable: bool = True) -> None:
    assert not enable, "gradient checkpointing not supported"


def ignore(self: nn.Module, enable: bool = True) -> None:
    pass


@pytest.mark.parametrize("setting", [refuse, ignore])
def test_a_backbone_that_cannot_recompute_its_blocks_is_told_in_one_line(setting, monkeypatch):
    backbone = create_backbone("resnet10t", {})
    monkeypatch.setattr(type(backbone), "set_grad_checkpointing", setting)
    with pytest.raises(UserError, match=r"model\.checkpoint_blocks: ResNet cannot recompute") as caught:
        Encoder(backbone, -1, checkpoint_blocks=True)
    assert "\n" not in str(caught.value)


def test_rotary_positions_are_computed_once_for_each_size_and_as_timm_does(monkeypatch):
    monkeypatch.setattr(rotary, "MOST_SIZES", 2)
    encoder = make("vit_small_patch16_dinov3", SMALL).eval()
    own, plain = encoder.backbone.rope, create_backbone("vit_small_patch16_dinov3", SMALL).rope
    own.kept.clear()
    with torch.inference_mode():
        own.get_embed((2, 3))
    assert own.kept == {}
    first = own.get_embed((2, 3))
    assert torch.equal(first, plain.get_embed((2, 3)))
    assert own.get_embed([2, 3]) is first
    others = [own.get_embed((3, 2)), own.get_embed((5, 4))]
    assert all(torch.equal(a, plain.get_embed(size)) for a, size in zip(others, [(3, 2), (5, 4)], strict=True))
    assert own.get_embed((3, 2)) is others[0]
    assert own.get_embed((5, 4)) is not others[1]  # the first sizes stay, others are not kept
    assert own.get_embed((2, 3)) is first
    assert copy.deepcopy(own).kept == {}
    assert len(own.kept) == 2
    assert own.to(torch.float64).kept == {}


def test_rotary_positions_that_are_drawn_anew_are_not_kept():
    encoder = make("vit_small_patch16_dinov3", SMALL)
    rope = encoder.backbone.rope
    rope.rescale_coords, rope.aug_active = 2.0, True
    rope.kept.clear()
    encoder.train()
    assert not torch.equal(rope.get_embed((2, 3)), rope.get_embed((2, 3)))
    assert rope.kept == {}


def test_sizes_of_an_evaluation_take_no_room_from_trainings():
    encoder = make("vit_small_patch16_dinov3", SMALL)
    rope = encoder.backbone.rope
    rope.kept.clear()
    with inference(encoder):
        rope.get_embed((2, 3))
        assert len(rope.kept) == 1
    assert rope.kept == {}
