"""The plain step: readable first, and what the fused one is measured against."""

from typing import Any

import torch
from torch import Tensor

from cosa_fast.config.schema import Config
from cosa_fast.data_pipeline.batch import Batch
from cosa_fast.distributed import ALONE, Ranks
from cosa_fast.engine.base import EngineBase, NonFiniteLoss, check_attentions
from cosa_fast.engine.optim import build_optimizer, load_optimizer_state, set_learning_rate
from cosa_fast.network.model import CoSANet


class Engine(EngineBase):
    """The plain step: torch.optim.AdamW, a moving average over parameter lists, and a look at every number."""

    def __init__(
        self,
        config: Config,
        num_classes: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        network: CoSANet | None = None,
    ) -> None:
        check_attentions(config, device, torch.float32)
        super().__init__(config, num_classes, device, ranks, network)
        self.choose_attentions()
        if device.type == "cuda":
            self.not_captured = "run.engine=plain"
        self.optimizer = build_optimizer(self.on.master, config.optim)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """As EngineBase.step.

        Raises NonFiniteLoss before anything is changed: weights, moments, thresholds and counter stay those of the
        last good step.
        """
        rate = set_learning_rate(self.optimizer, self.iteration, self.config.optim)
        # Random layers of a backbone (dropout, stochastic depth): like the data, a function of seed and iteration.
        torch.manual_seed(self._step_seed)
        before = [threshold.state_dict() for threshold in self.thresholds]
        shares, statistics = self.learn(batch)
        gradients = [self.ranks.sum_(gradient) for gradient in self._gradients()]
        try:
            self._check_finite({**shares, "gradient": torch.nn.utils.get_total_norm(gradients)})
        except NonFiniteLoss:
            for threshold, state in zip(self.thresholds, before, strict=True):
                threshold.load_state_dict(state)
            raise
        with self.phase("optimiser"):
            self.optimizer.step()
            self.an.update()
        self.iteration += 1
        return {**self._metrics(shares, statistics), "lr": torch.tensor(rate)}

    def check(self) -> None:
        """Nothing to do: `step` itself raises."""

    def _backward(self, loss: Tensor, first: bool) -> None:
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.optim.update_unused:
            for parameter in self._parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters() if parameter.grad is not None]

    def _check_finite(self, values: dict[str, Tensor]) -> None:
        bad = torch.stack([~torch.isfinite(value.detach()) for value in values.values()]).float()
        if bool(self.ranks.sum_(bad).any()):
            names = [name for name, count in zip(values, bad.tolist(), strict=True) if count]
            raise NonFiniteLoss(self.iteration, names[0])

    def _optimizer_state(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        load_optimizer_state(self.optimizer, state)
