"""Files in the form that other programs give to a network's weights."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosa_fast.network.model import CoSANet


def official_state(model: CoSANet) -> dict[str, Tensor]:
    """The model's weights under the names of the official release, with the head that its encoder carries along."""
    renamed = {
        key.replace("encoder.backbone.", "encoder.").replace("classifier_aux.", "aux_classifier."): value.clone()
        for key, value in model.state_dict().items()
    }
    width = model.encoder.width
    return renamed | {"encoder.head.weight": torch.zeros(10, width), "encoder.head.bias": torch.zeros(10)}


def save_official(path: Path, model: CoSANet, **settings: object) -> Path:
    """As the release's saver: numpy's number, and the command line with paths in it, beside the weights."""
    arguments = argparse.Namespace(
        name="EXP",
        output_dir=Path("/work_dir/EXP"),
        scales=(0.5, 2),
        seed=0,
        voc12_root=None,
        finalval=True,
        **settings,
    )
    content = {
        "s_or_t": "t",
        "model": official_state(model),
        "epoch": 20000,
        "args": arguments,
        "result": np.float64(75.72),
    }
    torch.save(content, path)
    return path
