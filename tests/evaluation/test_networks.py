"""Networks back from a file: read safely, whole, with what the run knew of thresholds."""

import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import FORMAT, load, load_networks
from cosa_fast.run import checkpoint


class Foreign:
    """A class that a safe reader must not build."""

    def __init__(self) -> None:
        self.value = torch.ones(2)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"hello world, this is a text file\n" * 50,
        b"\x00" * 1000,
        b"\x80\x02}q\x00.",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        pickle.dumps({"format": 1, "student": Foreign()}),
        pickle.dumps([1, 2, 3]),
        *(random.Random(seed).randbytes(300) for seed in range(8)),
        *(b"\x80\x02" + random.Random(seed).randbytes(300) for seed in range(8)),
    ],
)
def test_a_file_that_is_no_checkpoint_is_an_error_of_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"some\.pt") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_an_error(share: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    checkpoint.save(path, {"weights": torch.randn(5000), "iteration": 3})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"cut\.pt"):
        load(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_archive_is_an_error(seed: int, tmp_path: Path) -> None:
    """The archive is sound, the pickle in it is not."""
    whole, path = tmp_path / "whole.pt", tmp_path / "damaged.pt"
    checkpoint.save(whole, {"weights": torch.randn(3), "iteration": 3})
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            garbage = b"\x80\x02" + random.Random(seed).randbytes(100)
            target.writestr(name, garbage if name.endswith("data.pkl") else source.read(name))
    with pytest.raises(UserError, match=r"damaged\.pt") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """torch itself does not compare the checksums that it writes."""
    path = tmp_path / "00000001.pt"
    checkpoint.save(path, {"iteration": 1, "weights": torch.arange(4096.0)})
    whole = path.read_bytes()
    first = whole.index(torch.arange(4096.0).numpy().tobytes())
    for offset in range(first, first + 4 * 4096, 997):
        content = bytearray(whole)
        content[offset] ^= 1
        path.write_bytes(bytes(content))
        with pytest.raises(UserError, match="wrong checksum of"):
            load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iteration", "3"),
        ("iteration", -1),
        ("classes", [1, 2]),
        ("student", {"classifier.weight": 1.0}),
        ("teacher", {"classifier.weight": torch.tensor([torch.nan])}),
        ("thresholds", None),
        ("config", [1]),
    ],
)
def test_missing_and_mistyped_parts_are_named(
    name: str, value: object, make_engine: Callable[..., Engine], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    state = {
        **make_engine().state_dict(),
        "config": config_to_dict(make_config()),
        "classes": list("abcde"),
        "best": 0.0,
    }
    for changed in ({**state, name: value}, {key: item for key, item in state.items() if key != name}):
        checkpoint.save(tmp_path / "1.pt", changed)
        with pytest.raises(UserError, match=rf"1\.pt.*{name}") as caught:
            load_networks(tmp_path / "1.pt")
        assert "\n" not in str(caught.value)


def test_foreign_torch_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for content in ({"conv.weight": torch.zeros(2)}, [torch.zeros(2)], {"format": 99}):
        torch.save(content, path)
        with pytest.raises(UserError, match="not a cosa_fast checkpoint"):
            load(path)


def test_objects_are_never_built_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "objects.pt"
    torch.save({"format": FORMAT, "student": Foreign()}, path)
    with pytest.raises(UserError, match="cannot be read"):
        load(path)


def test_a_missing_file_says_where_checkpoints_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; checkpoints are in"):
        load(tmp_path / "none.pt")
    (tmp_path / "mine/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/checkpoints/best.pt").touch()
    with pytest.raises(UserError, match=r"none\.pt: no such file \(did you mean '.*/mine'\?\)"):
        load(tmp_path / "mien/checkpoints/none.pt")
    with pytest.raises(UserError, match=r"mine: is a folder; give one of .*mine/checkpoints/, for example best\.pt"):
        load(tmp_path / "mine")


@pytest.mark.parametrize("overrides", [(), ("model.aux_layer=null", "threshold.mode=fixed")])
def test_loaded_networks_give_the_engine_s_outputs(
    overrides: tuple[str, ...],
    make_engine: Callable[..., Engine],
    make_config: Callable[..., Config],
    batches: list[Batch],
    tmp_path: Path,
) -> None:
    engine = make_engine(*overrides)
    for batch in batches[:2]:
        metrics = engine.step(batch)
    classes = list("abcde")
    extra = {"config": config_to_dict(engine.config), "classes": classes, "best": 0.0}
    checkpoint.save(tmp_path / "00000002.pt", {**engine.state_dict(), **extra})

    networks = load_networks(tmp_path / "00000002.pt")

    assert (networks.iteration, networks.classes) == (2, tuple(classes))
    assert networks.thresholds == (
        pytest.approx(float(metrics["xi"])),
        pytest.approx(float(engine.threshold_values[1])) if not overrides else 0.45,
    )
    for own, network in ((engine.on.master, networks.on), (engine.an.master, networks.an)):
        assert not network.training
        assert not [p for p in network.parameters() if p.requires_grad]
        with torch.no_grad():
            pairs = zip(own(batches[2].weak), network(batches[2].weak), strict=True)
        for expected, actual in pairs:
            if expected is None:
                assert actual is None
            else:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_networks_do_not_ask_for_the_backbone_s_own_weights(
    make_engine: Callable[..., Engine], batches: list[Batch], tmp_path: Path
) -> None:
    """A checkpoint is whole: the file or hub that training began from may be gone."""
    engine = make_engine()
    values = config_to_dict(engine.config)
    values["model"]["weights"] = str(tmp_path / "gone.pth")
    extra = {"config": values, "classes": list("abcde"), "best": 0.0}
    checkpoint.save(tmp_path / "1.pt", {**engine.state_dict(), **extra})

    assert torch.equal(load_networks(tmp_path / "1.pt").on.classifier.weight, engine.on.master.classifier.weight)


def test_thresholds_are_unknown_before_cotraining_and_with_bands(
    make_engine: Callable[..., Engine], batches: list[Batch], tmp_path: Path
) -> None:
    band = ("threshold.mode=band", "loss.csc=0", "loss.reliability=none")
    for overrides in (("optim.cotrain_after=1",), band):
        engine = make_engine(*overrides)
        engine.step(batches[0])
        extra = {"config": config_to_dict(engine.config), "classes": list("abcde"), "best": 0.0}
        checkpoint.save(tmp_path / "1.pt", {**engine.state_dict(), **extra})
        assert load_networks(tmp_path / "1.pt").thresholds == (None, None)
