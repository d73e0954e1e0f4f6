"""A whole run: data, the loop around the engine's step, log, checkpoints, evaluation, and every way in which a run
can end."""

import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from cosa_fast.config.parsing import config_from_dict, config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.device import compute_type, pick_device
from cosa_fast.distributed import Ranks, is_lost_rank, ranks_of_launch
from cosa_fast.engine.base import EngineBase, NonFiniteLoss
from cosa_fast.engine.flops import step_flops
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine
from cosa_fast.errors import QuietError, UserError, first_line
from cosa_fast.evaluation.evaluator import EvalResult, evaluate_network
from cosa_fast.evaluation.networks import load, load_networks
from cosa_fast.files import write_json, write_text
from cosa_fast.network.model import CoSANet
from cosa_fast.pictures.gallery import gallery
from cosa_fast.run import checkpoint, manifest
from cosa_fast.run.data import Pipeline, choose_pipeline, loading, open_datasets, open_pipeline
from cosa_fast.run.log import MeanMetrics, RunLog, SilentLog, StepTimer
from cosa_fast.run.profiling import StepProfiler, check_iterations

GALLERY_IMAGES = 8
# Below this share of the reliability mass the segmentation is being pulled to background (METHOD section 11).
FOREGROUND_WARNING = 0.05


@dataclass(frozen=True)
class Summary:
    """How a run ended: its folder, the iteration reached, and the last evaluation by network (empty when it was
    stopped, and on all ranks but the first)."""

    directory: Path
    iteration: int
    results: dict[str, EvalResult]


def train(config: Config, *, resume: str | None = None, overwrite: bool = False, profile: int | None = None) -> Summary:
    """Train as configured. `resume`: "auto" (the run's newest checkpoint if there is one) or a checkpoint file.
    `profile`: profile so many iterations into the run's folder profile/ (cosa_fast/profiling.py).

    Raises UserError on bad input, on an existing run that is neither resumed nor overwritten, and on a loss that is not
    finite; a checkpoint of the last good state is written first.
    """
    directory = Path(config.run.output) / config.run.name
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    with ranks_of_launch(config.run.device) as ranks:

        def prepare() -> _Run:
            check_iterations(profile)
            state = _resume_state(config, directory, resume, overwrite, ranks)
            run = _Run(config, directory, *open_datasets(config), ranks)
            if state is not None:
                run.restore(state)
            run.choose_pipeline()
            return run

        return ranks.together(prepare).execute(profile)


class _Run:
    """The state of one running training."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        training_set: ImageDataset,
        validation_set: ImageDataset,
        ranks: Ranks,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.directory = directory
        self.training_set = training_set
        self.validation_set = validation_set
        ranks.share(config.optim.batch_size, config.optim.accumulate)
        self.device = pick_device(config.run.device, ranks.local_rank)
        engine = FusedEngine if config.run.engine == "fused" else Engine
        self.engine: EngineBase = engine(config, len(training_set.classes), self.device, ranks)
        self.best = float("-inf")
        self.pipeline_before: Pipeline | None = None
        self.stop_signal: int | None = None
        self.warned = False
        if config.data.crop_size % self.engine.student.stride:
            raise UserError(
                f"data.crop_size = {config.data.crop_size} must be a multiple of the backbone's stride, "
                f"{self.engine.student.stride}"
            )

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        if tuple(state["classes"]) != self.training_set.classes:
            raise UserError(f"{self.directory}: the checkpoint was trained on other classes than data.root has")
        try:
            self.engine.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.directory}: the checkpoint does not fit this configuration ({first_line(error)})"
            ) from error
        self.best = float(state["best"])
        self.pipeline_before = state.get("pipeline", "torch")  # before DALI there was no other

    def choose_pipeline(self) -> None:
        """Settle what data.pipeline means here."""
        self.pipeline, self.pipeline_reason = choose_pipeline(self.config, self.device, self.pipeline_before)

    def execute(self, profile: int | None = None) -> Summary:
        """Run to the end, or to a signal; the first rank profiles `profile` iterations."""
        if self.ranks.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._describe()
        previous = {name: signal.signal(name, self._on_signal) for name in (signal.SIGTERM, signal.SIGINT)}
        log = RunLog if self.ranks.is_main else SilentLog
        self.log = log(self.directory, self.config.optim.iterations, self.engine.iteration)
        profile = profile if self.ranks.is_main else None
        self.profiler = StepProfiler(profile, self.directory / "profile", self.log.message)
        try:
            results = self._loop()
        except NonFiniteLoss as error:
            path = self._save(self.checkpoints / "last_good.pt")
            if not self.ranks.is_main:
                raise QuietError(str(error)) from error
            raise UserError(
                f"{error}; the state before it is in {path}: go on from there with a lower optim.lr and --resume {path}"
            ) from error
        except UserError:
            self._save()
            raise
        except RuntimeError as error:
            if self.ranks.size > 1 and is_lost_rank(error):
                raise UserError(
                    "another process of this run has ended; see its own message above. The last checkpoint is whole: "
                    "go on with --resume auto"
                ) from error
            raise
        finally:
            self.profiler.close()
            self.log.close()
            for name, handler in previous.items():
                signal.signal(name, handler)
        return Summary(self.directory, self.engine.iteration, results if self.ranks.is_main else {})

    def _describe(self) -> None:
        text = yaml.safe_dump(config_to_dict(self.config), sort_keys=False, allow_unicode=True)
        write_text(self.directory / "config.yaml", text)
        extra = {
            "iteration": self.engine.iteration,
            "data_fingerprint": self.training_set.fingerprint(),
            "pipeline": self.pipeline,
            "training_images": len(self.training_set),
            "validation_images": len(self.validation_set),
        }
        manifest.write(self.directory / "manifest.json", manifest.describe(self.config, self.device, **extra))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop_signal = number

    def _loop(self) -> dict[str, EvalResult]:
        config, engine = self.config, self.engine
        results: dict[str, EvalResult] = {}
        if engine.iteration >= config.optim.iterations:
            results = self._evaluate()
            self._save()
            return results
        self._announce_pipeline()
        batches = iter(
            open_pipeline(
                config,
                self.training_set,
                self.device,
                self.pipeline,
                start=engine.iteration * config.optim.batch_size,
                rank=self.ranks.rank,
                ranks=self.ranks.size,
            )
        )
        metrics, timer = MeanMetrics(), StepTimer(self.device)
        flops = {phase: step_flops(engine.student, config, cotraining=phase) for phase in (False, True)}
        while engine.iteration < config.optim.iterations:
            asked = time.perf_counter()
            batch = next(batches).to(self.device)
            waited = time.perf_counter() - asked
            cotraining = engine.cotraining
            metrics.update(engine.step(batch))
            timer.waited(waited, flops[cotraining])
            self.profiler.step()
            self.log.advance()
            done = engine.iteration == config.optim.iterations
            if engine.iteration % config.run.log_every == 0 or done:
                engine.check()
                speed = timer.read(config.optim.batch_size, engine.replayed_peak)
                self._report({**metrics.read(self.ranks), **speed})
            if self.ranks.agree(self.stop_signal or 0):
                return self._stopped()
            if done or engine.iteration % config.eval.every == 0:
                results = self._evaluate()
                timer = StepTimer(self.device)
            if done or engine.iteration % config.run.checkpoint_every == 0:
                self._save()
        return results

    def _announce_pipeline(self) -> None:
        self.log.message(f"data pipeline: {self.pipeline} ({self.pipeline_reason})")
        if self.pipeline_before not in (None, self.pipeline):
            self.log.message(
                f"warning: the run has used the {self.pipeline_before} pipeline so far; the images stay the same, "
                "but their pixels differ a little, so it does not go on bit for bit"
            )

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

    def _evaluate(self) -> dict[str, EvalResult]:
        """Evaluate ON and AN, log both, and keep the best checkpoint by AN's label-free segmentation (its CAM before
        co-training)."""
        self.engine.check()
        results = {}
        for name, model in (("student", self.engine.student), ("teacher", self.engine.teacher.model)):
            with self.engine.evaluating():
                results[name] = self._evaluate_network(model)
            summary = {key: value for key, value in results[name].summary().items() if value == value}
            self.log.record(self.engine.iteration, {"network": name, **summary}, kind=f"eval_{name}")
            self.log.message(f"iteration {self.engine.iteration} {name}: {_headline(summary)}")
        self._keep_best(results["teacher"])
        return results

    def _evaluate_network(self, model: CoSANet) -> EvalResult:
        return evaluate_network(
            model,
            self.validation_set,
            classes=self.validation_set.classes,
            eval=self.config.eval,
            teacher=self.config.teacher,
            mean=self.config.data.mean,
            std=self.config.data.std,
            device=self.device,
            thresholds=self._evaluation_thresholds(),
            limit=self._evaluation_limit(),
            ranks=self.ranks,
            loading=loading(self.config, self.pipeline),
            dtype=compute_type(self.config.run.precision, self.device),
        )

    def _evaluation_limit(self) -> int | None:
        """eval.limit shortens the evaluations in the loop; the last one is over everything."""
        return None if self.engine.iteration >= self.config.optim.iterations else self.config.eval.limit

    def _evaluation_thresholds(self) -> tuple[float | None, float | None]:
        """(ξ, ξ†) once there are some."""
        if self.engine.iteration <= self.config.optim.cotrain_after or self.config.threshold.mode == "band":
            return None, None
        xi, xi_aux = self.engine.threshold_values
        return float(xi), float(xi_aux)

    def _keep_best(self, result: EvalResult) -> None:
        summary = result.summary()
        cotrained = self.engine.iteration > self.config.optim.cotrain_after
        score = summary["seg_label_free"] if cotrained else summary["cam_best"] - 1000
        if score > self.best:
            self.best = score
            self._save(self.checkpoints / "best.pt")

    def _stopped(self) -> dict[str, EvalResult]:
        path = self._save()
        self.log.message(
            f"stopped by a signal at iteration {self.engine.iteration}; saved {path}; go on with --resume auto"
        )
        return {}

    def _save(self, path: Path | None = None) -> Path:
        self.engine.check()
        rotating = path is None
        path = path or checkpoint.numbered_path(self.checkpoints, self.engine.iteration)
        if not self.ranks.is_main:
            return path
        state = {
            **self.engine.state_dict(),
            "config": config_to_dict(self.config),
            "classes": list(self.training_set.classes),
            "best": self.best,
            "pipeline": self.pipeline,
        }
        checkpoint.save(path, state)
        if rotating:
            checkpoint.rotate(self.checkpoints, self.config.run.keep)
        return path


def finish(summary: Summary, config: Config) -> None:
    """Leave the last evaluation beside the run: results.json, and gallery.png with pictures of the teacher's view."""
    figures = {name: result.summary() for name, result in summary.results.items()}
    write_json(summary.directory / "results.json", {"iteration": summary.iteration, **figures})
    networks = load_networks(checkpoint.latest(summary.directory / "checkpoints") or "")
    gallery(networks, open_datasets(config)[1], summary.directory / "gallery.png", GALLERY_IMAGES)


def _resume_state(
    config: Config, directory: Path, resume: str | None, overwrite: bool, ranks: Ranks
) -> dict[str, Any] | None:
    if resume is None and not ranks.is_main:
        return None
    if resume is None:
        # best.pt or last_good.pt may be all that an earlier run has left.
        kept = sorted((directory / "checkpoints").glob("*.pt"))
        if kept and not overwrite:
            raise UserError(
                f"{directory} holds a run already ({kept[0].name}); continue it with --resume auto, replace it with "
                "--overwrite, or give this one another run.name"
            )
        _clear(directory)
        return None
    path = checkpoint.latest(directory / "checkpoints") if resume == "auto" else Path(resume)
    if path is None:
        return None
    state = load(path)
    if ranks.is_main:
        _compare(config, state, path)
    return state


def _clear(directory: Path) -> None:
    """Remove what an earlier run of the same name left, so that two runs never mix in one folder."""
    patterns = (
        "checkpoints/*.pt",
        "tensorboard/*",
        "log.jsonl",
        "manifest.json",
        "results.json",
        "gallery.png",
        "profile/*",
    )
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        path.unlink()


def _compare(config: Config, state: dict[str, Any], path: Path) -> None:
    """Say which settings differ from the checkpoint's: the run goes on with the new ones, but not bit for bit."""
    saved = config_from_dict(state["config"], where=str(path))
    same_run = replace(saved, run=config.run, eval=config.eval)
    if config == same_run:
        return
    old, new = config_to_dict(same_run), config_to_dict(config)
    changed = [f"{s}.{k}: {old[s][k]} -> {new[s][k]}" for s in new for k in new[s] if old[s][k] != new[s][k]]
    print(f"resuming {path} with other settings ({'; '.join(changed)})", flush=True)


def _headline(summary: dict[str, float]) -> str:
    names = {
        "seg_label_free": "seg label-free",
        "seg_label_aware": "seg label-aware",
        "cam_best": "CAM at best threshold",
    }
    return "  ".join(f"{label} {summary[name]:.1f}" for name, label in names.items() if name in summary)
