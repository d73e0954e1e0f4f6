"""Every command in README.md and docs/ is run, on small stand-ins for data, networks and lengths: none can rot.

What is too heavy is replaced by nothing (what a benchmark measures, what needs several nodes): its command line is
still parsed by its own parser, its configuration read, its files looked for. A command that no function here knows is
an error.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults import killing
from official_files import save_official
from PIL import Image
from tiny_run import TINY

from cosa_fast import demo, evaluate, export, predict, prepare, train
from cosa_fast.config.parsing import config_to_dict, load_config
from cosa_fast.config.schema import Config, ModelConfig
from cosa_fast.data_pipeline.datasets.synthetic import CLASSES, generate
from cosa_fast.network.build import build_model
from cosa_fast.report import __main__ as report

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "python3", "torchrun", "srun", "bash", "make", "pip", "tensorboard", "export", ".")
# What a page writes where a reader has something of his own.
STAND_INS = {"FILE": "none", "NAME": "perplexity", "ABLATIONS.yaml": "table3.yaml"}
SETTING = re.compile(r"(data|model|teacher|threshold|loss|optim|eval|run)\.\w+=\S*")


@dataclass(frozen=True)
class Command:
    """A command of a page. words: as a shell would split it, assignments before it in `environment`."""

    place: str
    words: tuple[str, ...]
    environment: tuple[str, ...] = ()


def commands(page: str) -> list[Command]:
    """Every command of a page: in fenced blocks of a shell, in indented blocks, and in code within the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found, language, before = [], None, ""
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{page}:{number}"
        if line.startswith("```"):
            language = None if language is not None else line[3:].strip()
        elif language in ("", "sh", "bash") or (language is None and line.startswith("    ")):
            before, line = "", before + line.strip()
            if line.endswith("\\"):
                before = line[:-1]
            else:
                found += split(line, place)
        elif language is None:
            for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                found += split(code, place) if " " in code else []
    return found


def split(line: str, place: str) -> list[Command]:
    """The commands of a line; none where it does not begin with a program."""
    found = []
    for part in re.split(r"\s&&\s", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        environment = []
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            environment.append(words.pop(0))
        if words and words[0] in PROGRAMS:
            found.append(Command(place, tuple(words), tuple(environment)))
    return found


def settings(page: str) -> list[tuple[str, list[str]]]:
    """(place, key=value ...) of code in the text that is nothing but settings."""
    found = []
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        for code in re.findall(r"`([^`]+)`", line):
            words = code.split()
            if words and all(SETTING.fullmatch(word) for word in words):
                found.append((f"{page}:{number}", words))
    return found


COMMANDS = [command for page in PAGES for command in commands(page)]
SETTINGS = [setting for page in PAGES for setting in settings(page)]


class World:
    """A folder with stand-ins for all that the pages speak of, in which their commands run one after the other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: set[tuple[str, ...]] = set()
        self.data = root / "data"
        generate(self.data / "VOC2012", train=8, val=2, size=64, seed=1)
        lists = self.data / "VOC2012/ImageSets/Segmentation"
        shutil.copy(lists / "train.txt", lists / "train_aug.txt")
        self.voc_labels: dict[str, list[str]] = json.loads((self.data / "VOC2012/labels.json").read_text())
        shutil.copytree(self.data / "VOC2012", self.data / "VOCdevkit/VOC2012")
        self._write_coco()
        self._write_folders()

    def _write_coco(self) -> None:
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, 1)]
        (self.data / "coco/annotations").mkdir(parents=True)
        for split, prefix in (("train2014", "train"), ("val2014", "val")):
            (self.data / "coco" / split).mkdir()
            images, annotations = [], []
            for number, path in enumerate(sorted(self.data.glob(f"VOC2012/JPEGImages/{prefix}_*"))[:4], 1):
                shutil.copy(path, self.data / "coco" / split)
                images.append({"id": number, "file_name": path.name, "width": 64, "height": 64})
                square = {"image_id": number, "category_id": number, "iscrowd": 0, "area": 400, "bbox": [9, 9, 20, 20]}
                annotations.append({"id": number, "segmentation": [[9, 9, 29, 9, 29, 29, 9, 29]], **square})
            content = {"images": images, "annotations": annotations, "categories": categories}
            (self.data / f"coco/annotations/instances_{split}.json").write_text(json.dumps(content))

    def _write_folders(self) -> None:
        rows = ["photo,what is on it"]
        for folder in (self.data / "mine", self.data / "new", self.root / "folder"):
            folder.mkdir()
        for path in sorted(self.data.glob("VOC2012/JPEGImages/train_*")):
            shutil.copy(path, self.data / "mine")
            rows.append(f'{path.name},"{", ".join(self.voc_labels[path.stem])}"')
        (self.data / "mine/labels.csv").write_text("\n".join(rows) + "\n")
        for place in (self.data / "new/a.jpg", self.root / "folder/b.jpg", self.root / "photo.jpg"):
            Image.new("RGB", (40, 30), "teal").save(place)

    def stand_in(self, words: Sequence[str]) -> list[str]:
        """The words with what this world has in place of what is the reader's own."""
        formats = {"coco.yaml": "coco", "folder.yaml": "mine", "folder_small.yaml": "mine"}
        root = next((formats[word] for word in words if word in formats), "VOC2012")
        changed = []
        for word in words:
            key, equals, value = word.rpartition("=")
            value = f"/data/{root}" if value == "…" else STAND_INS.get(value, value)
            changed.append(key + equals + re.sub(r"^/data\b", str(self.data), value))
        return changed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _in_the_world(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world.root)


# How each kind of command is run


def small(section: str, values: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}={json.dumps(value)}" for key, value in values.items()]


SMALL = [
    *("data.crop_size=64", "data.workers=0", "data.pipeline=torch", "run.device=cpu", "run.threads=1"),
    *small("model", TINY["model"]),
    *("teacher.scales=[1.0]", "optim.iterations=2", "optim.cotrain_after=1", "optim.warmup=1", "optim.batch_size=4"),
    *("eval.scales=[1.0]", "eval.flip=false", "eval.coexistence=[]", "eval.cam_step=0.25", "eval.limit=1"),
]
# Of a standalone network.
SMALL_ENCODER = ["model.backbone=tu-test_resnet", "model.weights=none"]


def run_train(words: list[str], world: World) -> None:
    overrides = [word for word in words[1:] if SETTING.fullmatch(word)]
    config = load_config(words[0], overrides)  # as the page has it
    settings = SMALL
    if config.model.standalone:
        pytest.importorskip("segmentation_models_pytorch")
        place = str(config.data.pseudo_labels)
        if not Path(place).is_dir():
            first = "mine" if config.data.format == "folder" else "voc"
            asked = ["--split", config.data.train_split, "--what", "cpl", "-o", place]
            run_predict([f"runs/{first}/checkpoints/best.pt", *asked], world)
        settings = [word for word in SMALL if not word.startswith("model.")] + SMALL_ENCODER
    if "--resume" not in words:
        shutil.rmtree(Path("runs") / config.run.name, ignore_errors=True)
    assert train.main([*words, *settings]) == 0
    assert (Path("runs") / config.run.name / "results.json").is_file()


def require_run(checkpoint: str, world: World) -> None:
    """Train the run that a checkpoint is of, unless an earlier command has; or write a file as the release does."""
    if checkpoint == "FILE.pth":
        model = ModelConfig("vit_tiny_patch16_224", weights="none", decoder_width=16, position_resampling="plain")
        save_official(Path(checkpoint), build_model(model, len(CLASSES)))
    elif not Path(checkpoint).is_file():
        recipe = {"voc": "voc.yaml", "mine": "folder.yaml", "voc_ms": "ms.yaml"}[Path(checkpoint).parts[1]]
        run_train(world.stand_in([recipe, "data.root=…"]), world)


def run_evaluate(words: list[str], world: World) -> None:
    for word in words:
        if word.endswith((".pt", ".pth")):
            require_run(word, world)
    assert evaluate.main(words) == 0


def run_predict(words: list[str], world: World) -> None:
    require_run(words[0], world)
    output = Path(words[words.index("-o") + 1])
    shutil.rmtree(output, ignore_errors=True)
    assert predict.main(words) == 0
    assert list(output.glob("masks/*.png"))


def run_report(words: list[str], world: World) -> None:
    for word in words:
        if "/" in word and not word.endswith(".html"):
            require_run(f"{word.rstrip('/')}/checkpoints/best.pt", world)
    assert report.main(words) == 0


def run_export(words: list[str], world: World) -> None:
    """The format that takes a moment; of the others the options."""
    require_run(words[0], world)
    if "onnx" not in words and "torch-export" not in words and "--push-to-hub" not in words:
        assert export.main(words) == 0
    else:
        export._parser().parse_args(words)


def run_prepare(words: list[str], world: World) -> None:
    if "sbd" in words:  # gigabytes; test_download.py runs it on a few files
        assert prepare._parser().parse_args(words).download
    elif words:  # without: the command's name in a sentence
        assert prepare.main(words) == 0


def run_demo(words: list[str], world: World) -> None:
    (world.data / "demo").mkdir(exist_ok=True)
    assert demo.main([*words, *SMALL, f"data.root={world.data / 'VOC2012'}", "data.format=voc"]) == 0


def run_torchrun(words: list[str], world: World) -> None:
    from torch.distributed.run import get_args_parser

    asked = get_args_parser().parse_args(words)
    assert (asked.module, asked.training_script) == (True, "cosa_fast.train")
    nodes = int(asked.nnodes) if asked.nnodes.isdecimal() else 1
    parsed = world.stand_in(asked.training_script_args)
    config = load_config(parsed[0], [word for word in parsed[1:] if SETTING.fullmatch(word)])
    assert config.optim.batch_size % (nodes * int(asked.nproc_per_node)) == 0


def run_bench(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measuring."""
    door = importlib.import_module(f"bench.{name}")
    nothing: dict[str, Callable[..., Any]] = {
        "measure_all": lambda *_, **__: [{"results": []}],
        "compile_all": lambda *_, **__: {"rows": []},
        "predict_all": lambda *_, **__: [],
    }
    for step in ("print_static", "print_tables", "save_chart", "write"):
        nothing[step] = lambda *_, **__: None
    for step, replacement in nothing.items():
        if hasattr(door, step):
            monkeypatch.setattr(door, step, replacement)
    more = ["--dry-run"] if name == "ablate" and "--dry-run" not in words else []
    assert door.main([*words, *more]) == 0


def run_make(targets: list[str], world: World) -> None:
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    if "demo" in targets:
        run_module(["cosa_fast.demo"], world)


def check_pip(words: list[str]) -> None:
    """`pip install -c FILE -e ".[EXTRAS]"`, which is not done."""
    extras = re.fullmatch(r"\.(?:\[(.+)\])?", words[words.index("-e") + 1])
    assert extras is not None
    assert (ROOT / words[words.index("-c") + 1]).is_file()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            known = ast.literal_eval(node.value)
    assert set((extras[1] or "dev").split(",")) <= known.keys()


def run_module(words: list[str], world: World) -> None:
    module, *rest = words
    doors = {"train": run_train, "evaluate": run_evaluate, "predict": run_predict, "prepare": run_prepare}
    doors |= {"report": run_report, "export": run_export}
    if module in ("venv", "pytest") or tuple(words) in world.ran:
        return
    world.ran.add(tuple(words))
    package, _, name = module.rpartition(".")
    if package in ("bench.runs", "bench.steps"):
        importlib.import_module(module)
        return
    assert package == "cosa_fast", module
    if rest or name == "demo":
        {**doors, "demo": run_demo}[name](world.stand_in(rest), world)


def run(command: Command, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _, value in (assignment.partition("=") for assignment in command.environment):
        monkeypatch.setenv(name, value)
    program, *words = command.words
    if program == "srun":
        program, *words = words
    if program in ("python", "python3") and words[0] == "-m":
        run_module(words[1:], world)
    elif program in ("python", "python3") and words[0] == "tests/faults/killing.py":
        assert killing.parsed(words[1:]).kills > 0
    elif program in ("python", "python3"):
        assert (ROOT / words[0]).is_file()
        run_bench(Path(words[0]).stem, world.stand_in(words[1:]), monkeypatch)
    elif program == "torchrun":
        run_torchrun(words, world)
    elif program == "make":
        run_make(words, world)
    elif program == "pip":
        check_pip(words)
    elif program == "bash":
        subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)
    elif program == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure(["tensorboard", *words])
    else:
        assert program in (".", "export")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_command_of_the_pages_runs(command: Command, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    if command.words not in world.ran:
        run(command, world, monkeypatch)
    world.ran.add(command.words)


@pytest.mark.parametrize(("place", "words"), SETTINGS, ids=[place for place, _ in SETTINGS])
def test_settings_of_the_pages_are_settings(place: str, words: list[str]) -> None:
    keys = {f"{section}.{key}" for section, values in config_to_dict(Config()).items() for key in values}
    assert {word.partition("=")[0] for word in words} <= keys
    values = [word for word in words if not re.search(r"=($|…|\.\.\.|[A-Z/])", word)]
    load_config("voc.yaml", values)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


@pytest.mark.parametrize(
    "line", ["python -m cosa_fast.trian voc.yaml", "python bench/speed.py", "pip install -e .[all]"]
)
def test_a_command_that_does_not_exist_is_noticed(line: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = split(line, "a page")
    with pytest.raises((KeyError, AssertionError, ValueError)):
        run(command, world, monkeypatch)


def test_commands_are_found_where_they_stand() -> None:
    """A page whose commands were overlooked would pass."""
    by_page = {page: [command for command in COMMANDS if command.place.startswith(f"{page}:")] for page in PAGES}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        written = len(re.findall(r"(?:^|[`&]\s?|srun |^ {4})(?:python |torchrun )(?=\S)", text, re.MULTILINE))
        ours = sum("python" in command.words or "torchrun" in command.words for command in by_page[page])
        assert ours >= written, page
