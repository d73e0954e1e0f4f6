"""The learning rate over the iterations (METHOD section 6)."""

from cosa_fast.config import OptimConfig


def learning_rate(iteration: int, config: OptimConfig) -> float:
    """The encoder's learning rate for 0-based `iteration`: linear from `warmup_lr` to `lr` during `warmup` iterations,
    after that lr·(1 − t/iterations)^power with t counted from 0, not from the end of the warm-up."""
    if iteration < config.warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * iteration / config.warmup
    return config.lr * max(0.0, 1 - iteration / config.iterations) ** config.power
