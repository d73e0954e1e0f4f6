"""How a run ends, and what is saved when.

| | saved as |
|---|---|
| every run.checkpoint_every iterations, before and after every evaluation, after the last iteration | checkpoints/NNN.pt, the last run.keep of which stay |
| an evaluation better than all before | best.pt |
| the last iteration | results.json and results.csv, too |
| SIGTERM, SIGINT (Ctrl-C) in a step: the iteration is finished | NNN.pt |
| such a signal anywhere else | nothing more: all but what was begun is on the disk, and --resume auto does that again |
| an error that the user can mend, such as an unreadable image, a full disk, a killed worker | NNN.pt, where it can be written |
| a loss or gradient that is not finite | last_good.pt, the state before that iteration |
| another process of the run has gone | nothing more: the last NNN.pt is whole |
"""  # noqa: E501

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.distributed import Ranks, is_lost_rank
from cosa_fast.engine.base import NonFiniteLoss, TrainingEngine
from cosa_fast.errors import QuietError, UserError, first_line
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.networks import NAMES_IN_FILES
from cosa_fast.files import write_json, write_text
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.log import MeanMetrics, read_log
from cosa_fast.run.replacing import drop_replaced
from cosa_fast.run.signals import Signals

# A loss this many times the least of its phase has risen.
RISEN = 2.0
# The columns of results.csv that say of how many images the figures are.
EXTENT = ("evaluated_images", "of_images")


class Endings:
    """Saves a run's state, and turns what goes wrong into errors that say how to go on.

    `extra`: what a checkpoint holds besides the engine's state and the configuration. Every rank has one of these; the
    first writes.
    """

    def __init__(
        self,
        folder: RunFolder,
        engine: TrainingEngine,
        ranks: Ranks,
        signals: Signals,
        extra: Callable[[], dict[str, Any]],
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._ranks = ranks
        self._signals = signals
        self._extra = extra

    def save(self) -> Path:
        """Save the state under its iteration, and delete the checkpoints beyond run.keep. An earlier run that was to be
        replaced goes now."""
        path = self._save(self._folder.checkpoint(self._engine.iteration))
        if self._ranks.is_main:
            drop_replaced(self._folder)
            checkpoint.rotate(self._folder, self._engine.config.run.keep)
        return path

    def save_best(self, chosen: dict[str, Any]) -> None:
        """Save the state as the best so far. chosen: by which figure, and on which images."""
        self._save(self._folder.best, chosen=chosen)

    def stopped(self) -> str:
        """Save because of a signal; returns what to tell the user."""
        iteration, path = self._engine.iteration, self.save()
        return f"stopped by a signal at iteration {iteration}; saved {path}; go on with --resume auto"

    @property
    def told_to_stop(self) -> bool:
        """Whether any rank has got a signal; waits for all of them."""
        return bool(self._ranks.agree(self._signals.received))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """To train in: signals are noted for `told_to_stop`, and failures end as the table says."""
        try:
            with self._signals.noted():
                yield
        except NonFiniteLoss as error:
            raise self._not_finite(error) from error
        except UserError as error:
            self._rescue()
            raise error
        except (RuntimeError, OSError) as error:
            if self._ranks.size > 1 and isinstance(error, RuntimeError) and is_lost_rank(error):
                self._signals.obey()  # told to stop as well, the other was only faster
                raise
            problem = _of_the_machine(error)
            if problem is None:
                raise
            self._rescue()
            raise UserError(f"{problem}; then go on with --resume auto") from error

    def _rescue(self) -> None:
        """Save what there is, unless that is what has failed. The state before any iteration is worth nothing."""
        if not self._engine.iteration:
            return
        with suppress(UserError, OSError, RuntimeError):
            try:
                self.save()
            except NonFiniteLoss:  # nobody had looked yet; the engine is now where all was well
                self._save_last_good()

    def _not_finite(self, error: NonFiniteLoss) -> UserError:
        path = self._save_last_good()
        if not self._ranks.is_main:
            return QuietError(str(error))
        risen = rise(read_log(self._folder.log), self._engine.config.optim.cotrain_after)
        if risen is None:
            return UserError(
                f"{error}; the state before it is in {path}: go on from there with a lower optim.lr and --resume {path}"
            )
        before = [other for other in self._folder.numbered() if int(other.stem) < risen]
        advice = f"go on with a lower optim.lr and --resume {before[-1]}" if before else "start anew, lower optim.lr"
        return UserError(
            f"{error}; the loss rose from iteration {risen} on, {path.name} has it in it, and "
            f"{before[-1].name if before else 'no checkpoint'} is from before: {advice}"
        )

    def _save_last_good(self) -> Path:
        """The means of the log do not go in: the bad step has its part in them."""
        return self._save(self._folder.last_good, metrics=MeanMetrics().state_dict())

    def _save(self, path: Path, **changed: Any) -> Path:
        self._engine.check()
        if self._ranks.is_main:
            config = config_to_dict(self._engine.config)
            checkpoint.save(path, {**self._engine.state_dict(), "config": config, **self._extra(), **changed})
        return path


def rise(records: list[dict[str, Any]], cotrain_after: int) -> int | None:
    """The iteration of the first record of a loss that had risen and did not come down again before the log ends; None
    if it had not. Losses before and after co-training begins are not compared."""
    losses = [(record["iteration"], record["loss"]) for record in records if record.get("kind") == "train"]
    cotraining = bool(losses) and losses[-1][0] > cotrain_after
    phase = [(iteration, loss) for iteration, loss in losses if (iteration > cotrain_after) == cotraining]
    if len(phase) < 2:
        return None
    limit = RISEN * min(loss for _, loss in phase)
    risen = None
    for iteration, loss in reversed(phase):
        if loss <= limit:
            break
        risen = iteration
    return risen


def _of_the_machine(error: RuntimeError | OSError) -> str | None:
    """What to mend, for an error that is the machine's and not the program's; None for another."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:
        return "too many open files; set data.workers lower, or raise the limit (ulimit -n)"
    if isinstance(error, OSError):
        return f"{first_line(error)}; give more room or another place (run.output)"
    return None


def finish(folder: RunFolder, iteration: int, results: dict[str, AnyResult], split: str | None) -> None:
    """Leave the last evaluation in the folder of a run that has reached its end: results.json, and results.csv with a
    line per network and class. Both say of how many images. split: of which part of the data; None: held out."""
    figures = {NAMES_IN_FILES[name]: result.summary() for name, result in results.items()}
    on = {name: result.evaluated_on(split) for name, result in results.items()}
    places = {"evaluated_on": on["an"]} if on else {}
    write_json(folder.results, {"iteration": iteration, **places, **figures})
    lines = [
        {
            "network": NAMES_IN_FILES[name],
            "class": label,
            **scores,
            **dict(zip(EXTENT, (on[name]["images"], on[name]["of"]), strict=True)),
        }
        for name, result in results.items()
        for label, scores in result.per_class().items()
    ]
    text = io.StringIO()
    columns = sorted(dict.fromkeys(key for line in lines for key in line), key=EXTENT.__contains__)  # these two last
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value != value else value for key, value in line.items()} for line in lines)
    write_text(folder.per_class, text.getvalue())
