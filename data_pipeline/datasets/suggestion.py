"""What to do with a split that has been prepared: the command that trains on it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from cosa_fast.data_pipeline.datasets.opening import splits_of

_TRAINING = ("train_aug", "train2014", "train2017", "train", "training", "trainval")
_WEIGHTS = "timm downloads the weights; without network: model.weights=FILE, tf_efficientnet_lite0.safetensors"


def suggest(format: str, root: Path, split: str, images: int, labels: Path | None = None) -> str:
    """The command that trains on so many images; for a validation or test split beside one to train on, the command
    that prepares that one. labels: a label file that training does not look for. The schedule is that of PASCAL VOC
    (12 passes over 10582 images in batches of 4; co-training after 3/16, EMA over 1/20 of it), with 2000 iterations at
    the least.
    """
    known = splits_of(format, root)
    held, place = [name for name in known if _is_held(name)], shlex.quote(str(root))
    other = training_split(known)
    if _is_held(split) and other is not None:
        command = f"python -m cosa_fast.prepare --format {format} --root {place} --split {other}"
        return f"{split} is to evaluate on, not to train on; the command that trains is shown by: {command}"
    iterations = min(80_000, max(2000, round(12 * images / 4000) * 1000))
    own = (format, split) == ("folder", "train")
    settings = {
        "data.root": place,
        **({} if own else {"data.train_split": shlex.quote(split)}),
        **({"data.val_split": "null"} if format != "folder" and held in ([], [split]) else {}),
        **({"data.labels": shlex.quote(str(labels))} if labels is not None else {}),
        "optim.iterations": iterations,
        "optim.cotrain_after": iterations * 3 // 16,
        "optim.warmup": iterations // 20,
        "optim.batch_size": 4,
        "optim.lr": "6e-5",
        "teacher.momentum": round(1 - 20 / iterations, 5),
        "eval.every": iterations // 8,
    }
    recipe = {"synthetic": "demo"}.get(format, format)
    overrides = " ".join(f"{key}={value}" for key, value in settings.items())
    text = f"train with: python -m cosa_fast.train {recipe}.yaml {overrides}"
    if own:
        more = f" data.labels={settings['data.labels']}" if labels is not None else ""
        text += f"\nwithout a GPU: python -m cosa_fast.train folder_small.yaml data.root={place}{more}     # {_WEIGHTS}"
    return text


def training_split(known: Sequence[str]) -> str | None:
    """Of the splits that are there the one to train on: the usual names first; None where all are held out."""
    return next((name for name in (*_TRAINING, *known) if name in known and not _is_held(name)), None)


def _is_held(split: str) -> bool:
    """Whether the name is that of images that are held out of the training."""
    return split.lower().startswith(("val", "test"))
