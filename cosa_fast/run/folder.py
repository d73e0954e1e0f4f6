"""Every path below runs/NAME, and what may be removed there."""

import re
from dataclasses import dataclass
from pathlib import Path

from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run. Nothing is made or read before it is asked for."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """run.output/run.name."""
        return cls(Path(config.run.output).expanduser() / config.run.name)

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What the run was made with."""
        return self.path / "manifest.json"

    @property
    def log(self) -> Path:
        """A line of JSON for each record."""
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's events."""
        return self.path / "tensorboard"

    @property
    def results(self) -> Path:
        """The last evaluation."""
        return self.path / "results.json"

    @property
    def gallery(self) -> Path:
        """Pictures of the last evaluation."""
        return self.path / "gallery.png"

    @property
    def trace(self) -> Path:
        """A profile's trace, for chrome://tracing or ui.perfetto.dev."""
        return self.path / "profile" / "trace.json"

    @property
    def top(self) -> Path:
        """A profile's operators and kernels with the most time of their own."""
        return self.path / "profile" / "top.txt"

    @property
    def best(self) -> Path:
        """The checkpoint of the best evaluation."""
        return self.path / "checkpoints" / "best.pt"

    @property
    def last_good(self) -> Path:
        """The checkpoint before a loss that was not finite."""
        return self.path / "checkpoints" / "last_good.pt"

    def checkpoint(self, iteration: int) -> Path:
        """The checkpoint after so many iterations."""
        return self.path / "checkpoints" / f"{iteration:08d}.pt"

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
        files = (self.log, self.manifest, self.results, self.gallery)
        patterns = ("checkpoints/*.pt", "tensorboard/*", "profile/*")
        for path in (*files, *(path for pattern in patterns for path in self.path.glob(pattern))):
            path.unlink(missing_ok=True)
