"""One of several processes that train the tiny network: python -m torch.distributed.run ... rank_worker.py FILE.

FILE holds the configuration and the batches to train on; rank 0 writes
what came of it to FILE.out.
"""

import sys
from pathlib import Path

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


def main(path: Path) -> None:
    torch.set_num_threads(1)
    job = torch.load(path, weights_only=True)
    config = config_from_dict(job["config"], where=str(path))
    with ranks_of_launch(config.run.device) as ranks:
        device = pick_device(config.run.device, ranks.local_rank)
        engine = (FusedEngine if job["engine"] == "fused" else Engine)(config, job["classes"], device, ranks)
        losses = []
        for values in job["batches"]:
            metrics = engine.step(part(Batch(**values, ids=[]), ranks).to(device))
            sums = {name: ranks.host_sum(value.detach().cpu().clone()) for name, value in metrics.items()}
            losses.append({name: float(value) / ranks.size for name, value in sums.items()})
        if ranks.is_main:
            weights = {name: value.cpu().clone() for name, value in engine.on.master.state_dict().items()}
            torch.save({"losses": losses, "weights": weights, "xi": engine.threshold_values}, f"{path}.out")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
