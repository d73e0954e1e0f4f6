"""Several processes train as one does."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
import yaml

from cosa_fast.config.parsing import config_to_dict
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.data_pipeline.datasets.opening import open_dataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.distributed import ALONE, Ranks, is_lost_rank
from cosa_fast.errors import UserError
from cosa_fast.evaluation.networks import load
from cosa_fast.run import checkpoint
from cosa_fast.run.folder import RunFolder
from cosa_fast.run.training import train

CLASSES = 5  # of the tiny data set
WORKER = Path(rank_worker.__file__)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}


def torchrun(ranks: int, *command: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *command]


def uneven_batches(config: Config, count: int) -> list[dict[str, Any]]:
    """Batches of four whose images have very different numbers of valid pixels."""
    dataset = open_dataset("voc", config.data.root, "train")
    stream = iter(TorchPipeline(dataset, config.data, 4, seed=3))
    values = []
    for _ in range(count):
        batch = next(stream)
        batch.valid[0, 20:] = False
        batch.valid[3, :, :5] = False
        values.append({name: getattr(batch, name) for name in ("weak", "strong", "labels", "valid")})
    return values


def job(config: Config, engine: str, batches: list[dict[str, Any]]) -> dict[str, Any]:
    return {"config": config_to_dict(config), "batches": batches, "classes": CLASSES, "engine": engine}


def train_with(ranks: int, folder: Path, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    path = folder / f"jobs_{ranks}"
    torch.save(jobs, path)
    subprocess.run(torchrun(ranks, str(WORKER), str(path)), check=True, env=ENVIRONMENT, timeout=300)
    return torch.load(f"{path}.out", weights_only=True)


@pytest.mark.slow
def test_two_and_four_ranks_learn_what_one_does(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("optim.batch_size=4", "optim.cotrain_after=1", "optim.lr=1e-4", "loss.energy=1.0")
    parted = replace(config, optim=replace(config.optim, accumulate=2))
    batches = uneven_batches(config, 4)
    alone = rank_worker.train(job(config, "fused", batches), ALONE)
    jobs = [job(config, "fused", batches), job(config, "plain", batches), job(parted, "fused", batches)]
    for found in [*train_with(2, tmp_path, jobs), *train_with(4, tmp_path, jobs[:1])]:
        for expected_step, found_step in zip(alone["losses"], found["losses"], strict=True):
            for name in ("loss", "cls", "c2s", "c2s_aux", "s2c", "csc", "energy", "omega", "xi"):
                if name in expected_step:
                    assert found_step[name] == pytest.approx(expected_step[name], rel=1e-5), name
        a, b = (torch.cat([value.flatten() for value in each["weights"].values()]) for each in (found, alone))
        assert (a - b).norm() / b.norm() < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_learn_what_one_does_in_captured_steps(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(
        "optim.batch_size=4", "optim.cotrain_after=6", "optim.iterations=20", "optim.lr=1e-4", "run.device=cuda",
        "run.precision=fp32", "run.compile=off",
    )  # fmt: skip
    batches = uneven_batches(config, 14)  # each phase's steps are captured at its fourth
    (alone,), (two,) = (train_with(ranks, tmp_path, [job(config, "fused", batches)]) for ranks in (1, 2))
    for expected, found in zip(alone["losses"], two["losses"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    a, b = (torch.cat([value.flatten() for value in each["weights"].values()]) for each in (two, alone))
    assert (a - b).norm() / b.norm() < 1e-4


def command_of_run(config: Config, folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    return ["-m", "cosa_fast.train", str(path)]


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_alone_and_writes_once(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("optim.batch_size=4", "optim.iterations=5", "optim.cotrain_after=2", "run.checkpoint_every=3")
    command = torchrun(2, *command_of_run(config, tmp_path))
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=300)
    run = Path(config.run.output) / config.run.name
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"kind": "train"' in line for line in lines) == 5
    two = load(run / "checkpoints" / "00000005.pt")
    (run / "checkpoints" / "00000005.pt").unlink()
    train(config, resume="auto")
    one = load(run / "checkpoints" / "00000005.pt")
    for name, value in one["student"].items():
        torch.testing.assert_close(value, two["student"][name], rtol=1e-4, atol=1e-5)


def without_launcher(command: list[str]) -> list[subprocess.Popen[str]]:
    """Two ranks of a run. torchrun would send the one that is left a signal of its own, at times before that one has
    noticed anything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *command], env={**ENVIRONMENT, **meeting, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_with_one_clear_line(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(
        "optim.batch_size=2", "optim.iterations=100000", "optim.cotrain_after=0", "run.checkpoint_every=2"
    )
    folder = RunFolder(Path(config.run.output) / config.run.name)
    survivor, lost = without_launcher(command_of_run(config, tmp_path))
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.latest(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        lost.kill()
        output, _ = survivor.communicate(timeout=120)
    finally:
        for process in (survivor, lost):
            process.kill()
            process.communicate()
    assert survivor.returncode == 2, output
    assert "another process of this run has ended" in output, output
    assert "Traceback" not in output
    assert "go on with --resume auto" in output
    newest = checkpoint.latest(folder)
    assert newest is not None
    load(newest)


@pytest.mark.slow
def test_sigterm_saves_once_for_all_ranks(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("optim.batch_size=2", "optim.iterations=100000", "run.checkpoint_every=90000")
    run = Path(config.run.output) / config.run.name
    process = subprocess.Popen(
        torchrun(2, *command_of_run(config, tmp_path)),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    log = run / "log.jsonl"
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert output.count("stopped by a signal at iteration") == 1, output
    newest = checkpoint.latest(RunFolder(run))
    assert newest is not None
    assert load(newest)["iteration"] == int(newest.stem)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size = 6 cannot be shared by 4 processes"):
        Ranks(0, 4, 0).share(6)


def test_ranks_together_see_what_one_sees(make_config: Callable[..., Config]) -> None:
    config = make_config()
    dataset = open_dataset("voc", config.data.root, "train")

    def first_two(rank: int, ranks: int) -> list[Batch]:
        stream = iter(TorchPipeline(dataset, config.data, 6, seed=1, start=6, rank=rank, ranks=ranks))
        return [next(stream) for _ in range(2)]

    alone = first_two(0, 1)
    parts = [first_two(rank, 3) for rank in range(3)]
    for k, batch in enumerate(alone):
        assert batch.ids == [name for part in parts for name in part[k].ids]
        assert torch.equal(batch.strong, torch.cat([part[k].strong for part in parts]))


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:1: Connection reset by peer",
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:54321",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.29 ncclRemoteError: ...",
    ],
)
def test_a_connection_that_ended_is_a_lost_rank(message: str) -> None:
    assert is_lost_rank(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error: out of memory, NCCL version 2.29",
        "NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details), ncclInvalidUsage",
        "gloo: tensors must have the same size",
        "CUDA out of memory",
    ],
)
def test_other_errors_of_the_libraries_are_no_lost_rank(message: str) -> None:
    assert not is_lost_rank(RuntimeError(message))
    assert not is_lost_rank(torch.distributed.DistBackendError(message))
