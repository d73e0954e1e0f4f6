"""The model card of an exported network: README.md, as the hub of Hugging Face shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import cosa_fast
from cosa_fast.errors import UserError, counted
from cosa_fast.evaluation.evaluated import HELD_OUT, described
from cosa_fast.evaluation.exporting import FILES, OUTPUTS, Agreement, Format, facts
from cosa_fast.evaluation.networks import Networks
from cosa_fast.files import read_json
from cosa_fast.report.reading import evaluations
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import read_log

FIGURES = {
    "seg_label_free": "segmentation, label-free (all classes may appear)",
    "seg_label_aware": "segmentation, label-aware (told which classes the image holds)",
    "cam_best": "CAM at its best threshold, label-aware",
    "image_ap": "image classifier, average precision",
    "seg_cam_agreement": "agreement of CAM and segmentation (no masks: says nothing of their quality)",
}


def card(networks: Networks, name: str, format: Format, run: RunFolder, agreement: Agreement, license: str) -> str:
    """The card of the network "on" or "an". run: the folder that the checkpoint is of; what it lacks is said to be
    unknown. license: an identifier of the hub, or "other"."""
    manifest = _manifest(run)
    optim, data, model = networks.config.optim, networks.config.data, networks.config.model
    evaluation = _evaluation(run, name, networks.iteration)
    figures = [(text, evaluation[key]) for key, text in FIGURES.items() if isinstance(evaluation.get(key), int | float)]
    environment = Environment(
        loader=PackageLoader("cosa_fast.report", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("card.md").render(
        counted=counted,
        title=f"{'CoSA-MS' if model.standalone else 'CoSA'}, {model.backbone}, {Path(data.root).name}",
        network=_network(networks, name),
        standalone=model.standalone,
        scores=facts(networks)["outputs"][OUTPUTS[1]].partition(": ")[2],
        file=FILES[format],
        format=format,
        license=license,
        version=cosa_fast.__version__,
        commit=manifest.get("commit") or "unknown",
        classes=networks.classes,
        backbone=model.backbone,
        iteration=networks.iteration,
        optim=optim,
        data=data,
        set=Path(data.root).name,
        training_images=manifest.get("training_images"),
        seed=manifest.get("seed"),
        dynamic=networks.config.threshold.mode,
        figures=figures,
        place=described({"split": data.val_split or HELD_OUT, **evaluation.get("evaluated_on", {})}),
        known="images" in evaluation.get("evaluated_on", {}),
        has_masks="seg_label_free" in evaluation,
        bias=networks.bias,
        agreement=agreement,
        stride=networks.named(name).stride,
    )


def _network(networks: Networks, name: str) -> str:
    if networks.config.model.standalone:
        return f"a {networks.config.model.architecture}, which learned from the pseudo-labels of CoSA's networks"
    return {"on": "ON, the online network", "an": "AN, the assignment network (a moving average)"}[name]


def _manifest(run: RunFolder) -> dict[str, Any]:
    try:
        manifest = read_json(run.manifest)
    except UserError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _evaluation(run: RunFolder, name: str, iteration: int) -> dict[str, Any]:
    """The record of that of this very state; empty where there was none."""
    found = [each for each in evaluations(run, read_log(run.log), name) if each["iteration"] == iteration]
    return found[0] if found else {}
