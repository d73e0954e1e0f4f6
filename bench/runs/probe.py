"""What a backbone tells of the classes before it is trained: `python -m bench.runs.probe CONFIG [key=value ...]`.

CoSA's CAMs are those of a linear classifier on the maxima of the features over the image (GMP). Here the encoder stays
as its weights are, and a logistic regression for each class, its penalty chosen by cross-validation, learns from the
maxima of random crops, as training takes them. Where even that can hardly tell the classes of other images, a
classification phase has to teach the encoder the classes first.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bench.arguments import require_positive, result_file
from bench.operators.output import machine
from bench.tables import aligned
from cosa_fast.cli import CommandLine, run_cli
from cosa_fast.config.parsing import config_to_dict, load_config
from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.datasets.base import ImageDataset
from cosa_fast.data_pipeline.torch_pipeline import TorchPipeline
from cosa_fast.errors import UserError
from cosa_fast.files import write_json
from cosa_fast.network.build import build_model
from cosa_fast.network.encoder import Encoder
from cosa_fast.run.data import open_datasets

LEAST = 10  # images of a class, in each set, that a figure needs
PENALTIES = np.logspace(-4, 0, 5)
Array = NDArray[np.float64]


def main(argv: list[str] | None = None) -> int:
    """Probe F, and write the figures."""
    parser = CommandLine(prog="python -m bench.runs.probe", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="YAML file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=int, default=800, help="of each of the two sets, at most")
    parser.add_argument("--out", type=result_file, help="JSON")
    asked = parser.parse_intermixed_args(argv)
    require_positive(asked, "images")
    config = load_config(asked.config, asked.overrides)
    torch.manual_seed(config.run.seed)
    training, validation = open_datasets(config)
    encoder = build_model(config.model, len(training.classes)).encoder.eval()
    learned, seen = (maxima(config, encoder, each, asked.images) for each in (training, validation))
    precisions = average_precisions(learned, seen, training.classes)
    mean = float(np.mean([*precisions.values()]))
    rows = [[name, f"{value:.1f}"] for name, value in [*precisions.items(), ("mean", mean)]]
    print(aligned(["class", "AP, %"], rows))
    if asked.out is not None:
        figures = {"average_precision": precisions, "mean": mean, "images": [len(learned[0]), len(seen[0])]}
        write_json(asked.out, {"machine": machine(torch.device("cpu")), "config": config_to_dict(config), **figures})
    return 0


def maxima(config: Config, encoder: Encoder, dataset: ImageDataset, images: int) -> tuple[Array, Array]:
    """(max over the tokens of F, labels) of random crops: (N, D) and (N, C)."""
    stream = TorchPipeline(dataset, config.data, config.optim.batch_size, config.run.seed, workers=config.data.workers)
    batches = min(images, len(dataset)) // config.optim.batch_size
    features, labels = [], []
    with torch.inference_mode():
        for batch in islice(stream, batches):
            features.append(encoder(batch.weak)[0].amax((2, 3)))
            labels.append(batch.labels)
    if not batches:
        raise UserError(f"optim.batch_size = {config.optim.batch_size}: more than the images there are; set it lower")
    return torch.cat(features).double().numpy(), torch.cat(labels).double().numpy()


def average_precisions(
    learned: tuple[Array, Array], seen: tuple[Array, Array], classes: tuple[str, ...]
) -> dict[str, float]:
    """In percent, of the classes that enough images of both sets hold; UserError where there are none."""
    found = {}
    for index, name in enumerate(classes):
        truths = [labels[:, index] for _, labels in (learned, seen)]
        if min(min(truth.sum(), (1 - truth).sum()) for truth in truths) < LEAST:
            continue
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(regression, {"logisticregression__C": PENALTIES}, cv=3, scoring="average_precision")
        probe = search.fit(learned[0], truths[0])
        found[name] = 100 * float(average_precision_score(truths[1], probe.decision_function(seen[0])))
    if not found:
        raise UserError(
            f"no class has {LEAST} images with it and {LEAST} without it in both sets; give more (--images)"
        )
    return found


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
