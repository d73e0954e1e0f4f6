"""Services that follow a run besides its folder: Weights & Biases (log.wandb), MLflow (log.mlflow). Optional extras.

Where they write, and as whom, is their own configuration's: WANDB_MODE=offline and MLFLOW_TRACKING_URI, for example.
What goes wrong with one costs a line and that service, never the run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from PIL import Image

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.errors import UserError, first_line
from cosa_fast.run.folder import RunFolder

PROJECT = "cosa_fast"
LONGEST_VALUE = 500  # of a setting, in MLflow


class Tracker(Protocol):
    """One service, with one run of its own in it."""

    def record(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Figures by name."""

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """An RGB image."""

    def close(self) -> None:
        """The run is over."""


class WandbTracker:
    """A run of the project cosa_fast; those of one run.name are a group."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=config.run.name,
            group=config.run.name,
            dir=str(folder.path),
            config=config_to_dict(config),
        )

    def record(self, iteration: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=iteration)

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of the experiment cosa_fast."""

    def __init__(self, config: Config, folder: RunFolder) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(PROJECT)
        self._id = self._client.create_run(experiment, run_name=config.run.name).info.run_id
        for section, values in config_to_dict(config).items():
            for key, value in values.items():
                self._client.log_param(self._id, f"{section}.{key}", str(value)[:LONGEST_VALUE])

    def record(self, iteration: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._id, name, value, step=iteration)

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        self._client.log_image(self._id, image, artifact_file=f"{name}/{iteration:08d}.png")

    def close(self) -> None:
        self._client.set_terminated(self._id)


KINDS: dict[str, Callable[[Config, RunFolder], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def check_trackers(config: Config) -> None:
    """UserError where a service is asked for whose package is not installed."""
    for name in _wanted(config):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f'log.{name} = true needs the package {name}: pip install -c constraints.txt -e ".[{name}]", '
                f"or set log.{name}=false"
            )


class Trackers:
    """The services that a configuration asks for. say: is told what goes wrong."""

    def __init__(self, config: Config, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        for name in _wanted(config):
            self._attempt(name, partial(self._begin, name, config, folder))

    def record(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Figures by name, to all."""
        self._all(lambda tracker: tracker.record(iteration, figures))

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """An RGB image, to all."""
        self._all(lambda tracker: tracker.picture(iteration, name, image))

    def close(self) -> None:
        """The run is over."""
        self._all(lambda tracker: tracker.close())

    def _all(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in [*self._open.items()]:
            self._attempt(name, partial(do, tracker))

    def _begin(self, name: str, config: Config, folder: RunFolder) -> None:
        self._open[name] = KINDS[name](config, folder)

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # each service has errors of its own
            self._open.pop(name, None)
            self._say(f"warning: log.{name}: {first_line(error)}; the run goes on without it")


def _wanted(config: Config) -> Sequence[str]:
    return [name for name, wanted in (("wandb", config.log.wandb), ("mlflow", config.log.mlflow)) if wanted]
