"""The page of a run: every figure is there, nothing is fetched, and what is damaged costs no other figure."""

import base64
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from PIL import Image
from tiny_run import MakeConfig

from cosa_fast import api
from cosa_fast.config.parsing import config_from_dict
from cosa_fast.errors import UserError
from cosa_fast.report.__main__ import main
from cosa_fast.report.distributions import confused_pairs
from cosa_fast.report.page import WHY, write
from cosa_fast.report.page import page as page_of
from cosa_fast.report.reading import Run, read_runs, runs_in, where
from cosa_fast.run.training import train

FIGURES = {
    "mIoU of the segmentation",
    "mIoU of the CAMs",
    "Classes",
    "Confusions",
    "Thresholds ξ and ξ†",
    "Distance of ξ and ξ† to the best fixed threshold",
    "The CPL at every threshold",
    "Confidences, the mixture and its threshold",
    "Perplexity and accuracy",
    "Perplexity over time",
    "Losses",
    "Pseudo-labels in training",
    "Speed",
}
# What Chromium asks for by itself: updates, dictionaries, the time.
BROWSERS_OWN = (".google.com", ".googleapis.com", ".gstatic.com", ".gvt1.com")
PANELS = ["image", "CAM (AN)", "CAM† (AN)", "CPL (ξ = ", "perplexity", "Ω", "segmentation (AN)", "truth"]


@dataclass
class Page(HTMLParser):
    """The parts of a page: its pictures (source, alternative text), headings, links, and all of its text."""

    pictures: list[tuple[str, str]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.addresses += [values[name] for name in ("src", "href", "srcset", "data", "action") if name in values]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def run(tiny_values: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two evaluations, and its page."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs")
    config = config_from_dict(tiny_values, [f"run.output={output}", "eval.every=4"], where="tiny")
    return write(train(config).directory).parent


@pytest.fixture(scope="module")
def without_masks(tiny_values: dict, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a folder without masks, with one evaluation and one record of its training."""
    output = tmp_path_factory.mktemp("without")
    shutil.copytree(data_root / "JPEGImages", output / "mine")
    shutil.copy(data_root / "labels.json", output / "mine")
    overrides = [f"run.output={output}", f"data.root={output / 'mine'}", "data.format=folder", "data.val_split=null"]
    overrides += ["optim.iterations=2", "optim.cotrain_after=1", "run.log_every=2"]
    return write(train(config_from_dict(tiny_values, overrides, where="tiny")).directory).parent


@pytest.fixture
def page(run: Path) -> Page:
    return read(run / "report.html")


def drawings(page: Page) -> dict[str, ET.Element]:
    """The figures of a page by their titles."""
    sources = [(alt.partition(".")[0], source) for source, alt in page.pictures if "svg" in source[:20]]
    return {title: ET.fromstring(base64.b64decode(source.split(",", 1)[1])) for title, source in sources}


def box(text: ET.Element) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a line of an SVG's letters as matplotlib writes it: level or upright."""
    style, transform = text.get("style", ""), text.get("transform", "")
    size = float(re.search(r"font-size: ([\d.]+)px", style)[1])  # type: ignore[index]
    place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", transform)
    x, y = map(float, place.groups() if place else (text.get("x", 0), text.get("y", 0)))
    extents = TextPath((0, 0), text.text or " ", size=size, prop=FontProperties(family="DejaVu Sans")).get_extents()
    length, high = (extents.x1, extents.y1) if text.text else (0.0, 0.0)
    begin = -length * (0.5 if "middle" in style else 1.0 if "anchor: end" in style else 0.0)
    if "rotate(-90" in transform:
        return x - high, y - begin - length, x, y - begin
    return x + begin, y - high, x + begin + length, y


def test_no_letters_are_cut_off(page: Page, without_masks: Path) -> None:
    for title, root in (drawings(page) | drawings(read(without_masks / "report.html"))).items():
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for text in root.iter("{http://www.w3.org/2000/svg}text"):
            left, top, right, bottom = box(text)
            inside = left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1
            assert inside or "rotate(60" in text.get("transform", ""), (title, text.text, box(text), (width, height))


def test_without_masks_nothing_speaks_of_truth(without_masks: Path) -> None:
    page = read(without_masks / "report.html")
    for word in ("mIoU of this image", "is called", "Worst", "Best images", "best fixed", "the truth"):
        assert word not in page.text, word
    assert "CAM's pseudo-label segmentation pixels of the pseudo-label" in page.text, "the heads of the table"
    assert "agreement of segmentation and CAM's pseudo-label)" in page.text
    assert "1 image held out of the training" in " ".join(alt for _, alt in page.pictures)
    assert {"Without masks", "Classes", "Segmentation and CAM's pseudo-label"} < set(drawings(page))


def test_images_that_agree_least_and_most_are_called_that() -> None:
    rows = [{"why": why, "id": why, "present": [], "quality": 42.0, "panels": {}, "shown": []} for why in WHY]
    run = Run("mine", {}, {}, [], {"on": [], "an": []}, [], {"rows": rows, "classes": [], "iteration": 1})
    for has_masks, wanted in ((True, "Worst images"), (False, "Where they agree least")):
        observations = [{"iteration": 1, "has_masks": has_masks}]
        text = page_of([replace(run, observations=observations)])
        assert wanted in text
        assert ("% mIoU of this image" in text) == has_masks


def test_thresholds_are_seen_of_one_record_and_best_ones_where_there_are_any(page: Page, without_masks: Path) -> None:
    masked, unmasked = (drawings(each)["Thresholds ξ and ξ†"] for each in (page, read(without_masks / "report.html")))
    letters = ["".join(root.itertext()) for root in (masked, unmasked)]
    assert ["best fixed" in text for text in letters] == [True, False]
    markers = [use for use in unmasked.iter("{http://www.w3.org/2000/svg}use") if "#0072b2" in use.get("style", "")]
    assert markers, "one point makes no line"


def test_figures_say_of_how_many_images_they_are(run: Path, without_masks: Path, tmp_path: Path) -> None:
    """As their evaluation says, not as many as the set has."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in lines:
        if "evaluated_on" in record:
            assert record["evaluated_on"]["images"] == 2
            record["evaluated_on"]["of"] = 222
    (other / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    main([str(other)])
    page = read(other / "report.html")
    captions = " ".join(alt for _, alt in page.pictures)
    assert captions.count("2 of 222 images of val.") >= 7
    assert "validation images." not in captions
    assert "AN 6 2 of 222 " in page.text
    assert "chosen by eval.select = label-free on these images" in page.text
    main([str(run), str(other), "-o", str(tmp_path / "both.html")])
    assert "2 images of val or 2 of 222 images of val" in read(tmp_path / "both.html").text


def test_logs_without_the_number_of_images_leave_it_to_the_observations(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in each.items() if k != "evaluated_on"}) + "\n" for each in lines)
    (old / "log.jsonl").write_text(text)
    assert read_runs([old])[0].evaluations["an"][-1]["evaluated_on"] == {"images": 2}
    shutil.rmtree(old / "observed")
    records = read_runs([old])[0].evaluations["an"]
    assert where(records) == "validation images (how many is not recorded)"


def test_older_records_differ_in_nothing_that_they_do_not_say() -> None:
    """A run that was begun by an older version and resumed has records of both."""
    known = {"images": 8, "of": 50, "split": "val", "identity": "x"}
    assert where([{"evaluated_on": {"images": 8}}, {"evaluated_on": known}]) == "8 images"
    assert where([{"evaluated_on": known}, {"evaluated_on": known}]) == "8 of 50 images of val"
    others = [{"evaluated_on": known}, {"evaluated_on": known | {"identity": "y"}}]
    assert where(others) == "8 of 50 images of val, not always the same"


def test_every_figure_is_there_and_drawn(page: Page) -> None:
    drawn = {alt.partition(".")[0] for source, alt in page.pictures if "svg" in source[:20]}
    assert drawn == FIGURES
    for source, alt in page.pictures:
        head, data = source.split(",", 1)
        raw = base64.b64decode(data, validate=True)
        if "svg" in head:
            root = ET.fromstring(raw)
            assert root.tag.endswith("svg")
            assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 4, alt
    assert "cannot be drawn" not in page.text


def test_the_gallery_shows_every_panel_of_real_images(page: Page, run: Path) -> None:
    pictures = json.loads((run / "observed/pictures.json").read_text())
    row = pictures["rows"][0]
    assert all(any(title.startswith(panel) for title in row["panels"]) for panel in PANELS)
    assert {entry["why"] for entry in pictures["rows"]} == {"gallery", "worst", "best"}
    jpegs = [source for source, _ in page.pictures if source.startswith("data:image/jpeg")]
    assert len(jpegs) == len(pictures["rows"]) * len(PANELS)
    assert row["id"] in page.text
    assert all(name in page.text for name in row["present"])


def test_nothing_is_fetched(page: Page) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for source, alt in page.pictures:
        if "svg" in source[:20]:
            text = base64.b64decode(source.split(",", 1)[1]).decode()
            addresses = re.findall(r"""(?:href|src)\s*=\s*["']([^"']*)""", text) + re.findall(r"url\(([^)]*)", text)
            assert all(address.startswith(("#", "data:")) for address in addresses), alt


def test_a_page_drawn_again_is_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    assert main([str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == before


def test_runs_side_by_side_with_what_differs_and_names_that_are_no_markup(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("momentum: 0.9", "momentum: 0.5"))
    pictures = json.loads((other / "observed/pictures.json").read_text())
    pictures["rows"][0]["id"] = "<script>alert(1)</script>"
    (other / "observed/pictures.json").write_text(json.dumps(pictures))
    with pytest.raises(UserError, match="say where to"):
        main([str(run), str(other)])
    assert runs_in(other) == runs_in(tmp_path) == [other]
    with pytest.raises(UserError, match=r"/othre: no such folder \(did you mean '.*/other'\?\)"):
        main([str(tmp_path / "othre")])
    assert main([str(run), str(other), "-o", str(tmp_path / "both.html")]) == 0
    page = read(tmp_path / "both.html")
    assert "teacher.momentum 0.9 0.5" in page.text
    assert "data.root" not in page.text
    assert "cannot be" not in page.text
    assert "script" not in page.tags


def test_a_run_without_observations_or_evaluation_has_a_page(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        shutil.copy(run / name, old)
    main([str(old)])
    assert "mIoU of the segmentation" in read(old / "report.html").text
    lines = [line for line in (run / "log.jsonl").read_text().splitlines() if '"eval_' not in line]
    (old / "log.jsonl").write_text("\n".join(lines))
    main([str(old)])
    text = read(old / "report.html").text
    assert "No evaluation yet" in text
    assert "There are no pictures yet" in text
    assert "cannot be" not in text


def test_damaged_observations_cost_their_own_figures_only(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    first, last = sorted((broken / "observed").glob("[0-9]*.json"))
    record = json.loads(last.read_text())
    record["teacher"]["confusion"] = "nonsense"
    last.write_text(json.dumps(record))
    first.write_text("half a rec")
    (broken / "observed/pictures.json").write_text('{"rows": [{}]}')
    main([str(broken)])
    page = read(broken / "report.html")
    assert page.text.count("cannot be drawn") == 1
    assert page.text.count("cannot be shown") == 1
    assert {alt.partition(".")[0] for _, alt in page.pictures} == FIGURES - {"Confusions"}


@pytest.mark.parametrize(("missing", "message"), [("log.jsonl", "log.jsonl"), ("config.yaml", "config.yaml")])
def test_a_folder_that_is_no_run_is_one_line(run: Path, tmp_path: Path, missing: str, message: str) -> None:
    for name in {"log.jsonl", "config.yaml"} - {missing}:
        shutil.copy(run / name, tmp_path)
    with pytest.raises(UserError, match=f"no run .it lacks {message}"):
        main([str(tmp_path)])


def test_a_failing_report_costs_a_line_and_not_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink left")

    monkeypatch.setattr("cosa_fast.api.write", fail)
    summary = api.train(make_config("optim.iterations=1", "optim.cotrain_after=0"))
    assert summary.results
    assert "no ink left" in capsys.readouterr().out
    assert not summary.folder.report.exists()


def test_counts_behind_the_figures_are_those_of_the_evaluation(run: Path) -> None:
    found = read_runs([run])[0]
    observation, evaluation = found.last, found.evaluations["an"][-1]
    assert observation is not None
    confusion = np.array(observation["teacher"]["confusion"])
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    iou = np.diag(confusion)[union > 0] / union[union > 0]
    assert 100 * iou.mean() == pytest.approx(evaluation["seg_label_free"], abs=1e-9)
    pair = confused_pairs(found)[0]
    names = ["background", *observation["classes"]]
    assert confusion[names.index(pair.truth), names.index(pair.found)] == pair.pixels
    sweep = observation["teacher"]["sweep"]["cam"]
    assert max(sweep) == pytest.approx(evaluation["cam_best"], abs=1e-9)
    # At ξ, the confidences say how many pixels of the CPL are foreground, up to the bin that ξ lies in.
    counts = np.array(observation["teacher"]["confidence"]["cam"])
    known = counts[:, :3].sum(1)
    above = known[int(evaluation["cam_threshold"] * len(known)) + 1 :].sum()
    share = evaluation["foreground_share_cam"] * confusion.sum()
    assert above <= share <= above + known[int(evaluation["cam_threshold"] * len(known))]


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium")
    return found


def test_a_browser_shows_it(run: Path, chromium: str, tmp_path: Path) -> None:
    """At a phone's width: not blank, no sideways scrolling, and not one address asked for besides the file itself."""
    log = tmp_path / "net.json"
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", f"--log-net-log={log}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=500,3000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}"]
    screenshot = tmp_path / "page.png"
    subprocess.run(
        [*command, f"--screenshot={screenshot}", (run / "report.html").as_uri()], check=True, capture_output=True
    )
    with Image.open(screenshot) as image:
        pixels = np.array(image.convert("L"))
    assert (pixels < 128).mean() > 0.005
    assert (pixels[:, -8:] > 240).mean() > 0.9, "something reaches beyond the screen's edge"
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r'"url":"(http[^"]+)"', log.read_text())}
    assert not {host for host in hosts if not host.endswith(BROWSERS_OWN)}, "the page asks for something"
