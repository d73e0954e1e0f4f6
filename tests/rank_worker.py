"""One of several processes that train tiny networks: python -m torch.distributed.run ... rank_worker.py FILE.

FILE holds a list of jobs: a configuration, an engine, the batches to train on. Rank 0 writes what came of them to
FILE.out.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from cosa_fast.config.parsing import config_from_dict
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.device import pick_device
from cosa_fast.distributed import Ranks, ranks_of_launch
from cosa_fast.engine.fused import FusedEngine
from cosa_fast.engine.plain import Engine


def part(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's images."""
    return batch.map(lambda tensor: tensor.tensor_split(ranks.size)[ranks.rank])


def train(job: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Losses of every step, meant over the ranks, and the weights of ON after them."""
    config = config_from_dict(job["config"], where="job")
    device = pick_device(config.run.device, ranks.local_rank)
    engine = (FusedEngine if job["engine"] == "fused" else Engine)(config, job["classes"], device, ranks)
    losses = []
    for values in job["batches"]:
        metrics = engine.step(part(Batch(**values, ids=[]), ranks).to(device))
        sums = {name: ranks.host_sum(value.detach().cpu().clone()) for name, value in metrics.items()}
        losses.append({name: float(value) / ranks.size for name, value in sums.items()})
    weights = {name: value.cpu().clone() for name, value in engine.on.master.state_dict().items()}
    return {"losses": losses, "weights": weights}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    jobs = torch.load(path, weights_only=True)
    with ranks_of_launch(jobs[0]["config"]["run"]["device"]) as ranks:
        results = [train(job, ranks) for job in jobs]
        if ranks.is_main:
            torch.save(results, f"{path}.out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
