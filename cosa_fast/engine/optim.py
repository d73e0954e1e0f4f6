"""AdamW with the method's two parameter groups: encoder, and heads at `head_multiplier` times its rate (METHOD
section 6)."""

from typing import Any

import torch

from cosa_fast.config.schema import OptimConfig
from cosa_fast.network.build import SegmentationNetwork


def learning_rate(iteration: int, config: OptimConfig) -> float:
    """The encoder's learning rate for 0-based `iteration`: linear from `warmup_lr` (or lr·`warmup_ratio`) to `lr` in
    `warmup` iterations, after that lr·(1 − t/iterations)^power with t counted from 0, not from the end of the
    warm-up."""
    if iteration < config.warmup:
        start = config.warmup_lr if config.warmup_ratio is None else config.lr * config.warmup_ratio
        return start + (config.lr - start) * iteration / config.warmup
    return config.lr * max(0.0, 1 - iteration / config.iterations) ** config.power


def build_optimizer(model: SegmentationNetwork, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; `multiplier` in each group scales the scheduled rate."""
    groups = [
        {"params": model.encoder_parameters(), "multiplier": 1.0},
        {"params": model.head_parameters(), "multiplier": config.head_multiplier},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, iteration: int, config: OptimConfig) -> float:
    """Write the rate of `iteration` into every group; returns the encoder's."""
    rate = learning_rate(iteration, config)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
    return rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments from `state`, but keep the options (betas, weight decay, multiplier) that the optimiser was
    built with: a run resumed with other settings follows those, not the checkpoint's."""
    # Not lr: the schedule writes it before every step.
    options = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
