"""How a run ends, and what is saved when.

| | saved as |
|---|---|
| every run.checkpoint_every iterations, and after the last one | checkpoints/NNN.pt, the last run.keep of which stay |
| an evaluation better than all before | best.pt |
| the last iteration | results.json and results.csv, too |
| SIGTERM, SIGINT (Ctrl-C): the iteration is finished | NNN.pt |
| an error that the user can mend, such as an unreadable image | NNN.pt |
| a loss or gradient that is not finite | last_good.pt, the state before that iteration |
| another process of the run has gone | nothing more: the last NNN.pt is whole |
"""

import csv
import io
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.distributed import Ranks, is_lost_rank
from cosa_fast.engine.base import EngineBase, NonFiniteLoss
from cosa_fast.errors import QuietError, UserError
from cosa_fast.evaluation.evaluator import AnyResult
from cosa_fast.evaluation.networks import NAMES_IN_FILES
from cosa_fast.files import write_json, write_text
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder


class Endings:
    """Saves a run's state, obeys signals, and turns what goes wrong into errors that say how to go on.

    `extra`: what a checkpoint holds besides the engine's state and the configuration. Every rank has one of these; the
    first writes.
    """

    def __init__(
        self, folder: RunFolder, engine: EngineBase, ranks: Ranks, extra: Callable[[], dict[str, Any]]
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._ranks = ranks
        self._extra = extra
        self._signal = 0

    def save(self) -> Path:
        """Save the state under its iteration, and delete the checkpoints beyond run.keep."""
        path = self._save(self._folder.checkpoint(self._engine.iteration))
        if self._ranks.is_main:
            checkpoint.rotate(self._folder, self._engine.config.run.keep)
        return path

    def save_best(self) -> None:
        """Save the state as the best so far."""
        self._save(self._folder.best)

    def stopped(self) -> str:
        """Save because of a signal; returns what to tell the user."""
        iteration, path = self._engine.iteration, self.save()
        return f"stopped by a signal at iteration {iteration}; saved {path}; go on with --resume auto"

    @property
    def told_to_stop(self) -> bool:
        """Whether any rank has got a signal; waits for all of them."""
        return bool(self._ranks.agree(self._signal))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """To train in: signals are noted for `told_to_stop`, and failures end as the table says."""
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except NonFiniteLoss as error:
            raise self._not_finite(error) from error
        except UserError:
            self.save()
            raise
        except RuntimeError as error:
            if self._ranks.size == 1 or not is_lost_rank(error):
                raise
            raise UserError(
                "another process of this run has ended; see its own message above. The last checkpoint is whole: "
                "go on with --resume auto"
            ) from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def _not_finite(self, error: NonFiniteLoss) -> UserError:
        path = self._save(self._folder.last_good)
        if not self._ranks.is_main:
            return QuietError(str(error))
        return UserError(
            f"{error}; the state before it is in {path}: go on from there with a lower optim.lr and --resume {path}"
        )

    def _save(self, path: Path) -> Path:
        self._engine.check()
        if self._ranks.is_main:
            state = {**self._engine.state_dict(), "config": config_to_dict(self._engine.config), **self._extra()}
            checkpoint.save(path, state)
        return path


def finish(folder: RunFolder, iteration: int, results: dict[str, AnyResult]) -> None:
    """Leave the last evaluation in the folder of a run that has reached its end: results.json, and results.csv with a
    line per network and class."""
    figures = {NAMES_IN_FILES[name]: result.summary() for name, result in results.items()}
    write_json(folder.results, {"iteration": iteration, **figures})
    lines = [
        {"network": NAMES_IN_FILES[name], "class": label, **scores}
        for name, result in results.items()
        for label, scores in result.per_class().items()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value != value else value for key, value in line.items()} for line in lines)
    write_text(folder.per_class, text.getvalue())
