"""log.wandb and log.mlflow: what is handed on, without the services, and that a failing one costs no run."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_run import MakeConfig

from cosa_fast.errors import UserError
from cosa_fast.run.training import train

Call = tuple[str, dict[str, Any]]


class Service(ModuleType):
    """Stands in for wandb or mlflow, and remembers what is asked of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]  # what find_spec looks at
        self.calls: list[Call] = []
        self.broken = ""

    def note(self, call: str, **values: Any) -> Any:
        if call == self.broken:
            raise ConnectionError("nobody answers\nat all")
        self.calls.append((call, values))
        return SimpleNamespace(info=SimpleNamespace(run_id="7"), experiment_id="3")

    def of(self, call: str) -> list[dict[str, Any]]:
        return [values for name, values in self.calls if name == call]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service("wandb")

    def init(**values: Any) -> SimpleNamespace:
        service.note("init", **values)
        return SimpleNamespace(
            log=lambda figures, step: service.note("log", step=step, **figures), finish=lambda: service.note("finish")
        )

    service.init = init  # type: ignore[attr-defined]
    service.Image = lambda image: image  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service("mlflow")

    class Client:
        def __getattr__(self, name: str) -> Any:
            return lambda *values, **named: service.note(name, values=values, **named)

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return "3"

    service.MlflowClient = Client  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", service)
    return service


def test_both_get_settings_figures_and_the_gallery(make_config: MakeConfig, wandb: Service, mlflow: Service) -> None:
    config = make_config("optim.iterations=2", "optim.cotrain_after=1", "log.wandb=true", "log.mlflow=true")
    summary = train(config)
    assert wandb.of("init")[0]["config"]["optim"]["iterations"] == 2
    assert wandb.of("init")[0]["name"] == "tiny"
    steps = [values["step"] for values in wandb.of("log")]
    assert steps == sorted(steps), "wandb drops what goes back"
    logged = {name: value for values in wandb.of("log") for name, value in values.items()}
    assert logged["eval_AN/seg_label_free"] == summary.results["an"].summary()["seg_label_free"]
    assert logged["train/loss"] > 0
    assert isinstance(logged["gallery"], Image.Image)
    assert wandb.calls[-1][0] == "finish"

    metrics = {values["values"][1]: values for values in mlflow.of("log_metric")}
    assert metrics["eval_AN/seg_label_free"]["values"][2] == logged["eval_AN/seg_label_free"]
    assert metrics["train/loss"]["step"] == 2
    assert ("7", "optim.iterations", "2") in [values["values"] for values in mlflow.of("log_param")]
    assert mlflow.of("log_image")[0]["artifact_file"] == "gallery/00000002.png"
    assert mlflow.calls[-1][0] == "set_terminated"


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_service_costs_a_line(
    make_config: MakeConfig, wandb: Service, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.broken = broken
    summary = train(make_config("optim.iterations=1", "optim.cotrain_after=0", "log.wandb=true"))
    assert summary.results
    out = capsys.readouterr().out
    assert out.count("warning: log.wandb: nobody answers; the run goes on without it") == 1


def test_a_missing_package_is_told_before_anything_is_written(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = make_config("log.mlflow=true")
    with pytest.raises(UserError, match=r"log\.mlflow = true needs the package mlflow: pip install .*\[mlflow\]"):
        train(config)
