"""A whole run: the loop around the engine's step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import pick_device
from cosa_fast.distributed import Ranks, ranks_of_launch
from cosa_fast.engine.base import TrainingEngine
from cosa_fast.engine.flops import UncountableError, step_flops
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.engine.standalone import StandaloneEngine
from cosa_fast.errors import UserError
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.files import write_text
from cosa_fast.run import manifest
from cosa_fast.run.data import Pipeline, choose_pipeline, open_datasets, open_pipeline
from cosa_fast.run.endings import Endings, finish
from cosa_fast.run.evaluating import LoopEvaluation
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import MeanMetrics, RunLog, SilentLog, StepTimer, cut_log
from cosa_fast.run.manifest import fingerprints
from cosa_fast.run.observations import show_evaluation
from cosa_fast.run.opening import opening
from cosa_fast.run.profiling import StepProfiler, check_iterations
from cosa_fast.run.replacing import replacing, tidy
from cosa_fast.run.resuming import Start, changes, find_start, require_room, restore
from cosa_fast.run.signals import Signals, Stopped, told
from cosa_fast.run.trackers import check_trackers

# Below this share of the reliability mass the segmentation is being pulled to background (METHOD section 11).
FOREGROUND_WARNING = 0.05


@dataclass(frozen=True)
class Summary:
    """How a run ended: its folder, the iteration reached, and the last evaluation of each network, {"on": ..., "an":
    ...} (empty when a signal stopped the run, and on all ranks but the first)."""

    folder: RunFolder
    iteration: int
    results: dict[str, AnyResult]

    @property
    def directory(self) -> Path:
        """The folder's path."""
        return self.folder.path


def train(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    profile: int | None = None,
    report: Callable[[Path], object] | None = None,
) -> Summary:
    """Train as configured; a run that reaches its end leaves checkpoints, results.json and results.csv in its folder,
    and gallery.png.

    resume: "auto" (the run's newest whole checkpoint, if there is one) or a checkpoint file. overwrite: replace an
    earlier run of the same name, which goes when the new one has a checkpoint. profile: profile so many iterations into
    the folder (cosa_fast/run/profiling.py). report: called with the run's path after each evaluation, as
    cosa_fast.report.page.write wants to be.

    Raises UserError on bad input, on an existing run that is neither resumed nor overwritten, on a folder that another
    process writes to, and on a loss that is not finite. Once training has begun, a checkpoint is written first, so that
    --resume goes on. After SIGTERM or Ctrl-C in a step it finishes that, saves, and returns a summary without results.
    Anywhere else they mean what they meant before the call (an evaluation begins with a state on the disk, and a
    resumed run makes it up).

        config = load_config("demo.yaml", ["optim.iterations=100", "optim.cotrain_after=50"])
        summary = train(config, overwrite=True)
        print(summary.results["an"].table())
    """
    folder, signals = RunFolder.of(config), Signals()
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with ExitStack() as held:
        with ranks_of_launch(config.run.device) as ranks:

            def enter() -> None:
                check_iterations(profile)
                if ranks.is_main:
                    held.enter_context(folder.locked())
                    tidy(folder)

            def prepare() -> _Run:
                run = _Run(config, folder, ranks, signals, *find_start(folder, resume, overwrite), report)
                if not overwrite:  # last: what else is wrong is told before
                    require_room(folder, run.start, resume)
                return run

            ranks.together(enter)
            run = ranks.together(prepare)
            if ranks.is_main and not (run.start and run.start.is_of(folder)):
                held.enter_context(replacing(folder))
            results = run.execute(profile)
        if results:
            finish(folder, run.engine.iteration, results, config.data.val_split)
        return Summary(folder, run.engine.iteration, results)


class _Run:
    """The state of one running training."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        ranks: Ranks,
        signals: Signals,
        start: Start | None,
        notes: Sequence[str],
        report: Callable[[Path], object] | None,
    ) -> None:
        self.config = config
        self.report = report
        self.folder = folder
        self.ranks = ranks
        self.signals = signals
        self.start = start
        self.notes = list(notes)
        self.training_set, self.validation_set = open_datasets(config, self.notes.append)
        ranks.share(config.optim.batch_size, config.optim.accumulate)
        self.device = pick_device(config.run.device, ranks.local_rank)
        self.engine: TrainingEngine = _engine(config)(config, len(self.training_set.classes), self.device, ranks)
        _check_crop(config, self.engine.learner.stride)
        self.best = float("-inf")
        self.metrics = MeanMetrics()
        self.evaluated = 0  # the iteration of the last evaluation
        self.pipeline_before: Pipeline | None = None
        self.fingerprints = fingerprints(self.training_set, self.validation_set)
        if start is not None:
            restore(self.engine, start, self.training_set.classes)
            self.best = float(start.state["best"])
            self.evaluated = start.evaluated
            self.metrics.load_state_dict(start.state.get("metrics", {"sums": {}, "counts": {}}), self.device)
            self.pipeline_before = start.state.get("pipeline", "torch")  # before DALI there was no other
            self.notes.append(changes(config, self.fingerprints, start))
        check_trackers(config)
        self.pipeline, self.pipeline_reason = choose_pipeline(config, self.device, self.pipeline_before)
        self.warned = False
        self.not_captured = self.engine.not_captured

    def execute(self, profile: int | None) -> dict[str, AnyResult]:
        """Run to the end, or to a signal: the last evaluation, nothing after a signal or on ranks but the first."""
        main = self.ranks.is_main
        if main:
            self._describe()
            if self.start is not None:
                self.start.leave_newer()
                evaluated = self.evaluated == self.start.iteration and not self._done
                cut_log(self.folder.log, self.start.iteration, evaluated)
        self.log = RunLog(self.folder, self.config, self.engine.iteration) if main else SilentLog()
        self.profiler = StepProfiler(profile if main else None, self.folder, self.log.message)
        self.evaluation = LoopEvaluation(
            self.engine, self.validation_set, self.pipeline, self.ranks, self.best, self.log
        )
        self.endings = Endings(self.folder, self.engine, self.ranks, self.signals, self._extra)
        for text in filter(None, self.notes):
            self.log.message(text)
        try:
            with self.endings.guarded():
                results = self._loop()
        except BaseException:
            with suppress(UserError, OSError):  # what has failed before is to be told
                self.profiler.close()
                self.log.close()
            raise
        self.profiler.close()
        self.log.close()
        return results if main else {}

    @property
    def _done(self) -> bool:
        return self.engine.iteration >= self.config.optim.iterations

    def _describe(self) -> None:
        text = yaml.safe_dump(config_to_dict(self.config), sort_keys=False, allow_unicode=True)
        write_text(self.folder.config, text)
        if self.config.data.val_split is None:
            write_text(self.folder.held_out, "\n".join(self.validation_set.ids) + "\n")
        on, an = self.engine.attentions
        extra = {
            "iteration": self.engine.iteration,
            "attention": {"on": on, "an": an},
            "not_captured": self.engine.not_captured,
            "data_fingerprint": self.training_set.fingerprint(),
            "pipeline": self.pipeline,
            "training_images": len(self.training_set),
            "validation_images": len(self.validation_set),
        }
        manifest.write(self.folder.manifest, manifest.describe(self.config, self.device, **extra))

    def _extra(self) -> dict[str, Any]:
        """What a checkpoint holds besides the engine's state and the configuration."""
        return {
            "classes": list(self.training_set.classes),
            "best": self.evaluation.best,
            "evaluated": self.evaluated,
            "metrics": self.metrics.state_dict(),
            "pipeline": self.pipeline,
            "data": self.fingerprints,
        }

    def _loop(self) -> dict[str, AnyResult]:
        config, engine = self.config, self.engine
        if self._done:
            self.log.message(
                f"no iteration is left ({engine.iteration} of {config.optim.iterations}): the last evaluation follows"
            )
            return self._evaluate()
        results: dict[str, AnyResult] = {}
        self._announce_pipeline()
        flops = self._flops()
        if self._evaluation_is_due:  # the run was ended before it
            self._evaluate()
        batches = self._batches()
        timer = StepTimer(self.device)
        while not self._done:
            asked = time.perf_counter()
            try:
                batch = self._next(batches)
            except Stopped:
                return self._stop()
            seconds_for_data = time.perf_counter() - asked
            cotraining = engine.cotraining
            self.metrics.update(engine.step(batch))
            self._note_capture()
            timer.step_ended(seconds_for_data, flops[cotraining])
            self.profiler.step()
            self.log.advance()
            if engine.iteration % config.run.log_every == 0 or self._done:
                engine.check()
                speed = timer.read(config.optim.batch_size, engine.replayed_peak)
                self._report({**self.metrics.read(self.ranks), **speed})
            if self.endings.told_to_stop:
                return self._stop()
            if self._evaluation_is_due:
                results = self._evaluate()
                timer.restart()
            elif engine.iteration % config.run.checkpoint_every == 0:
                self.endings.save()
        return results

    def _stop(self) -> dict[str, AnyResult]:
        """Save and say so, because of a signal; there are no results."""
        self.log.message(self.endings.stopped())
        told()
        return {}

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """Alone, a process does not wait for data when it is told to stop; several stop after the same step."""
        with self.signals.raised() if self.ranks.size == 1 else nullcontext():
            return next(batches).to(self.device)

    @property
    def _evaluation_is_due(self) -> bool:
        iteration = self.engine.iteration
        return iteration > self.evaluated and (self._done or iteration % self.config.eval.every == 0)

    def _flops(self) -> dict[bool, int | None]:
        """FLOPs of a step, by whether it co-trains; None where they cannot be counted, which is said."""
        try:
            return {phase: step_flops(self.engine.learner, self.config, cotraining=phase) for phase in (False, True)}
        except UncountableError as error:
            self.log.message(f"no TFLOP/s in the log: {error}")
            return {False: None, True: None}

    def _batches(self) -> Iterator[Batch]:
        stream = open_pipeline(
            self.config,
            self.training_set,
            self.device,
            self.pipeline,
            start=self.engine.iteration * self.config.optim.batch_size,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )
        return iter(stream)

    def _announce_pipeline(self) -> None:
        reason = self.pipeline_reason
        self.log.message(
            opening(self.engine, self.training_set, self.validation_set, self.pipeline, reason, self.folder)
        )
        if self.pipeline_before not in (None, self.pipeline):
            self.log.message(
                f"warning: the run has used the {self.pipeline_before} pipeline so far; the images stay the same, "
                "but their pixels differ a little, so it does not go on bit for bit"
            )

    def _note_capture(self) -> None:
        """A capture that has failed on the way, in the log; the engine has said so on the terminal."""
        if self.engine.not_captured != self.not_captured:
            self.not_captured = self.engine.not_captured
            self.log.record(self.engine.iteration, {"not_captured": self.not_captured}, "capture")

    def _report(self, values: dict[str, float]) -> None:
        iteration = self.engine.iteration
        self.log.record(iteration, values)
        remaining = self.config.optim.iterations - iteration
        self.log.progress(iteration, values, remaining * values["seconds_per_iteration"])
        if values.get("foreground_reliability", 1.0) < FOREGROUND_WARNING and not self.warned:
            self.warned = True
            self.log.message(
                f"warning: iteration {iteration}: foreground holds {values['foreground_reliability']:.1%} of the "
                "reliability mass of the CAM pseudo-label, and the segmentation may collapse to background; "
                "co-train later (optim.cotrain_after), or see loss.foreground_weight and threshold.clamp"
            )

    def _evaluate(self) -> dict[str, AnyResult]:
        """With the state on the disk before it begins, and with its outcome when all that it leaves is written: a run
        that is ended before that makes the evaluation up."""
        self.endings.save()
        before = self.evaluated, self.evaluation.best
        try:
            with self.signals.obeyed():
                results, best = self.evaluation.evaluate()
            self.evaluated = self.engine.iteration
            if best:
                self.endings.save_best(self.evaluation.chosen)
            if self.ranks.is_main:
                with self.signals.obeyed():
                    show_evaluation(self.folder, self.engine, self.validation_set, results, self.log, self.report)
        except BaseException:  # a state that is saved now must not know of a best.pt that is not there
            self.evaluated, self.evaluation.best = before
            raise
        self.endings.save()
        return results


def _engine(config: Config) -> type[FusedEngine] | type[Engine] | type[StandaloneEngine]:
    if config.model.standalone:
        return StandaloneEngine
    return FusedEngine if config.run.engine == "fused" else Engine


def _check_crop(config: Config, stride: int) -> None:
    if config.data.crop_size % stride:
        raise UserError(
            f"data.crop_size = {config.data.crop_size} must be a multiple of the backbone's stride, {stride}"
        )
