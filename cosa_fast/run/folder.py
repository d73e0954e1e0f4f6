"""Every path below runs/NAME, and what may be removed there."""

import re
from pathlib import Path

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError


class RunFolder:
    """The folder of one run. Nothing is made or read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.log = path / "log.jsonl"
        self.tensorboard = path / "tensorboard"
        self.held_out = (
            path / "held_out.txt"
        )  # the images that are evaluated and not trained on, without data.val_split
        self.results = path / "results.json"  # the last evaluation, and pictures of it
        self.per_class = path / "results.csv"
        self.gallery = path / "gallery.png"
        self.observed = path / "observed"  # what a report draws of the evaluations (run/observations.py)
        self.pictures = self.observed / "pictures.json"
        self.report = path / "report.html"
        self.trace = path / "profile" / "trace.json"  # for chrome://tracing or ui.perfetto.dev
        self.top = path / "profile" / "top.txt"  # what took the most time of its own
        self.best = path / "checkpoints" / "best.pt"
        self.last_good = path / "checkpoints" / "last_good.pt"  # the state before a loss that was not finite

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """run.output/run.name."""
        return cls(Path(config.run.output).expanduser() / config.run.name)

    def checkpoint(self, iteration: int) -> Path:
        """The checkpoint after so many iterations."""
        return self.path / "checkpoints" / f"{iteration:08d}.pt"

    def observation(self, iteration: int) -> Path:
        """What the evaluation after so many iterations has left for a report."""
        return self.observed / f"{iteration:08d}.json"

    def numbered(self) -> list[Path]:
        """The checkpoints by iteration that are there, the newest last."""
        found = (self.path / "checkpoints").glob("*.pt")
        return sorted(path for path in found if re.fullmatch(r"\d+\.pt", path.name))

    def require_no_run(self) -> None:
        """UserError if an earlier run left a checkpoint; best.pt or last_good.pt may be all that there is."""
        kept = sorted((self.path / "checkpoints").glob("*.pt"))
        if kept:
            raise UserError(
                f"{self.path} holds a run already ({kept[0].name}); continue it with --resume auto, replace it with "
                "--overwrite, or give this one another run.name"
            )

    def clear(self) -> None:
        """Remove what an earlier run left, so that two runs never mix in one folder."""
        records = (self.log, self.manifest, self.held_out)
        files = (*records, self.results, self.per_class, self.gallery, self.report)
        patterns = ("checkpoints/*.pt", "tensorboard/*", "profile/*", "observed/*")
        for path in (*files, *(path for pattern in patterns for path in self.path.glob(pattern))):
            path.unlink(missing_ok=True)
