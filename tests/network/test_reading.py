"""Weight files of any origin: what they may hold beside weights, which network is taken, how they are refused."""

import argparse
import pathlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cosa_fast.errors import UserError
from cosa_fast.network.reading import UnreadableError, Weights, network_in, read_file

NAMES = ("encoder.pos_embed", "encoder.blocks.0.norm1.weight", "decoder.conv6.weight", "classifier.weight")


def network(value: float) -> dict[str, Tensor]:
    return {name: torch.full((2,), value) for name in NAMES}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def taken(content: object) -> Weights:
    found = network_in(content, "file")
    assert set(found.state) == set(NAMES)
    return found


@pytest.mark.parametrize(
    "value",
    [
        *(np.dtype(name).type(1) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")),
        argparse.Namespace(a=1, nested=argparse.Namespace(b=np.float64(2.5))),
        pathlib.PosixPath("/some/where"),
        OrderedDict(a=1),
    ],
    ids=repr,
)
def test_what_scripts_save_beside_their_weights_is_read(value: object, tmp_path: Path) -> None:
    torch.save({"model": network(1.0), "beside": value}, tmp_path / "w.pth")
    assert network_in(read_file(tmp_path / "w.pth"), "w.pth").state.keys() == set(NAMES)


def test_numbers_of_older_numpy_are_read(tmp_path: Path) -> None:
    """Their pickles name numpy.core, newer ones numpy._core."""
    path, older = tmp_path / "w.pth", tmp_path / "older.pth"
    torch.save({"model": network(1.0), "result": np.float64(71.25)}, path, _use_new_zipfile_serialization=False)
    older.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert read_file(older)["result"] == 71.25


class Foreign:
    """Of no library."""


@pytest.mark.parametrize("value", [Foreign(), nn.Linear(2, 2), print, np.zeros(2)], ids=repr)
def test_other_objects_are_refused_in_a_short_line_without_terminal_codes(value: object, tmp_path: Path) -> None:
    torch.save({"model": network(1.0), "beside": value}, tmp_path / "w.pth")
    with pytest.raises(UnreadableError, match="holds a Python object") as caught:
        read_file(tmp_path / "w.pth")
    assert len(str(caught.value)) < 150
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["w.pt", "old.pt", "w.safetensors"])
def test_a_file_that_is_cut_short_is_to_be_copied_again(name: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "w.safetensors":
        safetensors.torch.save_file({"weight": torch.ones(100, 100)}, path)
    else:
        torch.save({"weight": torch.ones(100, 100)}, path, _use_new_zipfile_serialization=name == "w.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UnreadableError, match=r"^it is truncated or damaged$") as caught:
        read_file(path)
    assert caught.value.remedy.startswith("copy or download it again")


@pytest.mark.parametrize("name", ["m.onnx", "m.pt2"])
def test_a_graph_for_other_programs_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UnreadableError, match=r"^it is a graph for other programs$") as caught:
        read_file(tmp_path / name)
    assert "safetensors" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html>Not found", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_what_came_in_place_of_a_file_is_named(content: bytes, reason: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableError, match=f"^it is {reason}"):
        read_file(tmp_path / name)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module.", "net."]
)
def test_wrappers_come_off_the_names(prefix: str) -> None:
    assert taken(prefixed(prefix, network(1.0))).notes == ()


def test_a_wrapper_inside_the_network_comes_off_too() -> None:
    state = {key.replace("encoder.", "encoder._orig_mod."): tensor for key, tensor in network(1.0).items()}
    assert taken({"state_dict": state}).notes == ()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"model": network(1.0), "ema": network(2.0)}, "took ema, left out model"),
        (
            {"model_ema": prefixed("module.", network(2.0)), "state_dict": network(1.0)},
            "took model_ema, left out state_dict",
        ),
        ({"student": network(1.0), "teacher": network(2.0)}, "took teacher, left out student"),
        ({"model": network(1.0), "ema": {"decay": 0.999, "shadow": network(2.0)}}, "took ema, left out model"),
        (prefixed("student.", network(1.0)) | prefixed("teacher.", network(2.0)), "took teacher, left out student"),
        (
            {"state_dict": prefixed("model.", network(1.0)) | prefixed("ema_model.", network(2.0))},
            "took ema_model, left",
        ),
        (
            prefixed("online_model.", network(1.0)) | prefixed("ema_model.", network(2.0)) | {"step": torch.tensor(3)},
            "took ema_model, left out online_model",
        ),
    ],
)
def test_of_a_pair_the_average_is_taken_and_said(content: object, note: str) -> None:
    found = taken(content)
    assert found.state["classifier.weight"][0] == 2
    assert found.notes[0].startswith(note)


@pytest.mark.parametrize("empty", [{}, {"decay": 0.999}, None, 0.9994])
def test_an_average_without_weights_is_passed_over(empty: object) -> None:
    found = taken({"ema": empty, "model": network(1.0)})
    assert (found.state["classifier.weight"][0], found.notes) == (1, ())


def test_an_averaged_model_of_torch_is_read() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert set(network_in(averaged.state_dict(), "file").state) == {"weight", "bias"}


def test_second_branches_and_projection_heads_are_left_out_by_name() -> None:
    first, second = prefixed("module.branch1.", network(1.0)), prefixed("module.branch2.", network(2.0))
    found = taken(first | second)
    assert (found.state["classifier.weight"][0], found.notes) == (1, ("took branch1, left out branch2",))
    beside = {"proj_head.mlp.0.weight": torch.ones(2), "proj_head_t.last_layer.weight_g": torch.ones(2)}
    beside |= {"encoder_k.pos_embed": torch.ones(2), "prototypes": torch.ones(2), "queue_ptr": torch.ones(1)}
    assert taken(prefixed("module.", network(1.0) | beside)).notes == (
        "left out encoder_k, proj_head, proj_head_t, prototypes, queue_ptr",
    )


def test_settings_are_those_of_the_command_line() -> None:
    content = {
        "model": network(1.0),
        "epoch": 7,
        "s_or_t": "t",
        "args": argparse.Namespace(aux_layer=-4, crop_size=320),
    }
    assert taken(content).settings == {"aux_layer": -4, "crop_size": 320, "epoch": 7, "s_or_t": "t"}


@pytest.mark.parametrize("content", [None, 3, [], {}, {"epoch": 3}, {"model": {"epoch": 3}}])
def test_a_file_without_weights_is_told(content: object) -> None:
    with pytest.raises(UserError, match="file: holds no state dict"):
        network_in(content, "file")


def test_a_mapping_that_holds_itself_comes_to_an_end() -> None:
    content: dict[str, object] = {}
    content["model"] = content
    with pytest.raises(UserError, match="holds no state dict"):
        network_in(content, "file")
