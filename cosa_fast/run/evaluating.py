"""Evaluations of ON and AN: in the loop, with the choice of the best checkpoint, and of a checkpoint's networks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from cosa_fast.config.parsing import config_from_dict, config_to_dict, settings_named
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.device import pick_device
from cosa_fast.distributed import Ranks
from cosa_fast.engine.base import TrainingEngine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.cleaning import Cleaner
from cosa_fast.evaluation.crf_scores import CrfResult, score_crf
from cosa_fast.evaluation.evaluator import (
    AnyResult,
    Evaluator,
    Thresholds,
    check_classes,
    class_indices,
    spread,
)
from cosa_fast.evaluation.label_only import LabelResult
from cosa_fast.evaluation.networks import NAMES_IN_FILES, Networks, has_thresholds, title
from cosa_fast.run.data import Pipeline, choose_pipeline, loading, open_validation_set
from cosa_fast.run.log import RunLog

HEADLINE = {
    "seg_label_free": "seg label-free",
    "seg_label_aware": "seg label-aware",
    "cam_best": "CAM at best threshold",
    "image_ap": "image AP",
}
THRESHOLDS = {"cam_threshold_loss": "at ξ", "cam_aux_threshold_loss": "CAM† at ξ†"}
# The settings that a prediction of images, one of a data set, or an evaluation uses. To change others, which belong to
# the training, would change nothing, silently.
OF_IMAGES = (
    *("data.mean", "data.std", "data.workers"),
    *("teacher.scales", "teacher.flip", "teacher.aux_scales", "eval.scales", "eval.flip"),
    *("run.device", "run.precision", "run.threads"),
)
PREDICTION = (*("data.root", "data.format", "data.labels", "data.classes"), *OF_IMAGES)  # of a data set
EVALUATION = (
    *PREDICTION,
    *("data.val_split", "data.train_split", "data.crop_size", "data.pipeline", "data.prefetch"),
    *("eval.protocol", "eval.classes", "eval.coexistence", "eval.cam_step", "eval.limit", "eval.batch_size"),
)


def headline(summary: Mapping[str, float]) -> str:
    """An evaluation in a line, from EvalResult.summary(): mIoU; what ξ and ξ† cost against their maps' best fixed
    thresholds, in points; the foreground's share of M's pseudo-label at ξ, and of the truth."""
    if "foreground_share_seg" in summary:
        return _headline_without_masks(summary)
    figures = [f"{label} {summary[figure]:.1f}" for figure, label in HEADLINE.items() if figure in summary]
    for figure, label in THRESHOLDS.items():
        if figure in summary:
            points = summary[figure]
            figures.append(f"{label} {abs(points):.1f} {'less' if points > -0.05 else 'more'}")
    if "foreground_share_cam" in summary:
        figures.append(
            f"foreground {summary['foreground_share_cam']:.0%} (truth {summary['foreground_share_true']:.0%})"
        )
    return "  ".join(figures)


def _headline_without_masks(summary: Mapping[str, float]) -> str:
    agreement = cam = ""
    if "seg_cam_agreement" in summary:
        agreement = f"  CAM/segmentation agreement {summary['seg_cam_agreement']:.1f}"
        cam = f" (CAM {summary['foreground_share_cam']:.0%})"
    ap = f"image AP {summary['image_ap']:.1f}" if "image_ap" in summary else "no image AP"
    return f"{ap}{agreement}  foreground {summary['foreground_share_seg']:.0%}{cam}"


class LoopEvaluation:
    """Evaluates the engine's networks as the run goes on, logs the figures, and knows the best ones so far.

    `best` is the mIoU of the segmentation in percent that eval.select names. Before co-training it is that of the CAM
    less 1000: any co-trained network is better. `chosen` says by which figure, and on which images.
    """

    def __init__(
        self, engine: TrainingEngine, dataset: ImageDataset, pipeline: Pipeline, ranks: Ranks, best: float, log: RunLog
    ) -> None:
        self.best = best
        self.chosen: dict[str, Any] = {}
        self._engine = engine
        self._dataset = dataset
        self._log = log
        self._ranks = ranks
        config = engine.config
        self._evaluator = Evaluator(
            config, dataset.classes, engine.device, loading=loading(config, pipeline), ranks=ranks
        )

    def evaluate(self) -> tuple[dict[str, AnyResult], bool]:
        """The results of "on" and "an", or as eval.networks says of "an" alone but at the end, over all images or over
        eval.limit of them; and whether they are the best so far. A standalone network is "an"."""
        engine = self._engine
        engine.check()
        config = engine.config
        networks = dict(engine.masters)
        compared = config.eval.networks == "both" or config.eval.select == "label-aware"
        if not compared and engine.iteration < config.optim.iterations:
            networks = {"an": networks["an"]}
        with engine.evaluating(), evaluation_bar(_in_words(networks, config), self._ranks.is_main) as progress:
            results = self._evaluator.evaluate_all(
                networks, self._dataset, thresholds=thresholds_of(engine), limit=config.eval.limit, progress=progress
            )
        for name, result in results.items():
            self._report(name, result)
        return results, self._is_best(results)

    def _report(self, name: str, result: AnyResult) -> None:
        iteration, key = self._engine.iteration, NAMES_IN_FILES[name]
        summary = {key: value for key, value in result.summary().items() if value == value}
        self._log.record(iteration, {"network": key, **summary}, kind=f"eval_{key}")
        limited = " (eval.limit)" if result.images != result.set_size else ""
        shown = title(name, self._engine.config)
        self._log.message(f"iteration {iteration} {shown}, {result.extent}{limited}: {headline(summary)}")

    def _is_best(self, results: Mapping[str, AnyResult]) -> bool:
        config = self._engine.config
        select, figures = config.eval.select, {name: result.summary() for name, result in results.items()}
        if select == "none" or isinstance(results["an"], LabelResult):
            self.chosen = {"by": "none"}  # nothing tells better from worse: the last is the best
            return True
        cotrained = config.model.standalone or self._engine.iteration > config.optim.cotrain_after
        names = [name for name in ("an", "on") if name in results] if select == "label-aware" else ["an"]
        figure = f"seg_{select.replace('-', '_')}" if cotrained else "cam_best"
        name = max(names, key=lambda each: figures[each][figure])
        score = figures[name][figure] - (0 if cotrained else 1000)
        if not score > self.best:
            return False
        self.best = score
        self.chosen = {"by": figure, "of": NAMES_IN_FILES[name], "value": figures[name][figure]}
        self.chosen |= {"on": config.data.val_split or "held out", "images": results[name].images}
        return True


def thresholds_of(engine: TrainingEngine) -> Thresholds:
    """(ξ, ξ†), each None where the run has none, or none yet."""
    if not has_thresholds(engine.config, engine.iteration):
        return None, None
    xi, xi_aux = (threshold.value for threshold in engine.thresholds)
    return float(xi), float(xi_aux)


def configure(networks: Networks, overrides: Sequence[str], where: str, used: Sequence[str] = EVALUATION) -> Config:
    """The checkpoint's configuration with overrides of the settings that are `used`; UserError for others. Those of the
    model say what an imported file is."""
    known = {f"{section}.{key}" for section, values in config_to_dict(networks.config).items() for key in values}
    for override in overrides:
        for key in settings_named(override):
            tells = networks.imported is not None and key.startswith("model.")
            if key in known.difference(used) and not tells:
                raise UserError(
                    f"override '{override}': {key} belongs to the training of {where} and has no effect here; what "
                    f"has: {', '.join(used)}"
                )
    if networks.imported is not None:
        return networks.config  # in which the overrides are
    config = config_from_dict(config_to_dict(networks.config), overrides, where=where)
    before, now = networks.config.data, config.data
    if before.val_split and not now.val_split and (before.root, before.train_split) == (now.root, now.train_split):
        raise UserError(
            f"data.val_split: nothing was held out of the training of {where}, which saw all of {now.train_split}; "
            f"give a split by its name, such as data.val_split={before.val_split}"
        )
    return config


def evaluate_networks(
    networks: Networks, config: Config, names: Sequence[str] = ("on", "an"), *, limit: int | None = None
) -> dict[str, AnyResult]:
    """The result of each named network ("on", "an") on data.val_split, or on `limit` images of it (None: eval.limit); a
    terminal shows a bar. UserError for a set that does not fit the networks, or a file that cannot be read."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    device = pick_device(config.run.device)
    dataset = open_validation_set(config)
    pipeline, _ = choose_pipeline(config, device)
    networks = networks.for_classes(dataset.classes)
    evaluator = Evaluator(config, networks.classes, device, loading=loading(config, pipeline))
    limit = config.eval.limit if limit is None else limit
    asked = names[:1] if networks.single else names  # both are one network
    chosen = {name: networks.named(name).to(device) for name in asked}
    with evaluation_bar(_in_words(chosen, config)) as progress:
        results = evaluator.evaluate_all(
            chosen, dataset, thresholds=networks.thresholds, limit=limit, progress=progress
        )
    return {name: results.get(name, results[asked[0]]) for name in names}


def evaluate_crf(
    networks: Networks,
    config: Config,
    names: Sequence[str],
    methods: Sequence[str],
    *,
    limit: int | None = None,
    side: int | None = None,
) -> dict[str, CrfResult]:
    """What the CRF makes of each named network's label-free segmentations, by each of `methods` ("ours", "pydensecrf");
    images, limit, bar and errors as in `evaluate_networks`. side: longer images are shrunk to it for the CRF."""
    device = pick_device(config.run.device)
    dataset = open_validation_set(config)
    networks = networks.for_classes(dataset.classes)
    check_classes(dataset, networks.classes)
    chosen = spread(len(dataset), config.eval.limit if limit is None else limit)
    averaged = config.eval.classes or networks.classes
    indices = (0, *class_indices(averaged, networks.classes, "eval.classes"))
    source = loading(config, choose_pipeline(config, device)[0])
    results: dict[str, CrfResult] = {}
    with Cleaner(methods, config.data.workers, device, side) as cleaner:
        for name in names:
            if networks.single and results:
                results[name] = next(iter(results.values()))
                continue
            network = networks.named(name).to(device)
            with evaluation_bar(f"{title(name, config)} with CRF") as progress:
                results[name] = score_crf(network, dataset, chosen, config, indices, cleaner, source, progress)
    return results


@contextmanager
def evaluation_bar(what: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """What to call with (done, total) images as an evaluation goes on: a terminal shows a bar, below that of the
    training if there is one. what: the networks, in words."""
    off = None if shown else True  # None: off where stderr is no terminal
    with tqdm(desc=f"evaluating {what}", unit="image", leave=False, dynamic_ncols=True, disable=off) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _in_words(names: Iterable[str], config: Config) -> str:
    return " and ".join(title(name, config) for name in names)
