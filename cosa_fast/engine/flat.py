"""Both networks' trainable parameters in flat buffers, and the one pass over them that ends a step.

float32 masters, moments and moving average; with a half compute type also copies of both networks in that type, which
the same pass writes. Modules hold views into the buffers, with the strides that their parameters had.
"""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cosa_fast.config.schema import Config
from cosa_fast.engine.optim import build_optimizer
from cosa_fast.kernels import adamw_ema_
from cosa_fast.network.model import CoSANet

# Elements between the starts of two parameters: 128 bytes in bfloat16, what matrix kernels like best.
ALIGNMENT = 64


@dataclass(frozen=True)
class _Slot:
    """One trainable parameter and its place in the buffers."""

    name: str
    multiplier: float
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.shape.numel() // ALIGNMENT) * ALIGNMENT

    def view(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided(self.shape, self.stride, self.offset)


@dataclass
class _Run:
    """Neighbouring slots that learn at one rate and have been updated equally often: `step` () int64, on the device."""

    slots: range
    start: int
    end: int
    multiplier: float
    step: Tensor


class FlatNetworks:
    """ON, AN and the optimiser's state.

    `masters`: the float32 networks (ON, AN), for checkpoints and evaluation. `compute`: those to compute with, the same
    ones unless `dtype` is a half type.
    """

    def __init__(self, on: CoSANet, an: CoSANet, config: Config, dtype: torch.dtype) -> None:
        self._config = config
        self.masters = (on, an)
        self.slots = _lay_out(on, config)
        count, device = self.slots[-1].end, next(on.parameters()).device

        def buffer(kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(count, dtype=kind, device=device)

        self.parameters, self.ema, self.exp_avg, self.exp_avg_sq = (buffer() for _ in range(4))
        # Sums over several parts of a batch would lose digits in a half type.
        self.gradients = buffer(dtype if config.optim.accumulate == 1 else torch.float32)
        self._attach(on, self.parameters)
        self._attach(an, self.ema)
        self.compute = self.masters
        self._halves: tuple[Tensor | None, Tensor | None] = (None, None)
        if dtype != torch.float32:
            halves = (buffer(dtype), buffer(dtype))
            self.compute = (copy.deepcopy(on).to(dtype), copy.deepcopy(an).to(dtype))
            for network, half in zip(self.compute, halves, strict=True):
                self._attach(network, half)
            self._halves = halves
        self._trained = [self.compute[0].get_parameter(slot.name) for slot in self.slots]
        self._gradient_views = [slot.view(self.gradients) for slot in self.slots]
        self._steps: list[Tensor | None] = [None] * len(self.slots)
        self._runs: list[_Run] = []

    def clear_gradients(self) -> None:
        """Before a backward pass."""
        for parameter in self._trained:
            parameter.grad = None

    def collect_gradients(self, *, add: bool) -> None:
        """After a backward pass: all gradients into the flat buffer `gradients`, 0 where a parameter has none; added to
        what is there for a later part of a batch."""
        active = [parameter.grad is not None for parameter in self._trained]
        self._plan([used or self._config.optim.update_unused for used in active])
        found = [p.grad for p in self._trained if p.grad is not None]
        if len(found) < len(active) and not add:
            self.gradients.zero_()
        views = [view for view, used in zip(self._gradient_views, active, strict=True) if used]
        if add:
            torch._foreach_add_(views, found)
        else:
            torch._foreach_copy_(views, found)

    def update(self, lr: Tensor, momentum: float, enabled: Tensor, backend: str) -> None:
        """AdamW and moving average of everything that had a gradient; nothing happens where `enabled` () is False."""
        config = self._config.optim
        for run in self._runs:
            part = slice(run.start, run.end)
            adamw_ema_(
                self.parameters[part],
                self.gradients[part],
                self.exp_avg[part],
                self.exp_avg_sq[part],
                self.ema[part],
                run.step,
                lr,
                lr_multiplier=run.multiplier,
                weight_decay=config.weight_decay,
                betas=config.betas,
                momentum=momentum,
                parameters_bf16=None if self._halves[0] is None else self._halves[0][part],
                ema_bf16=None if self._halves[1] is None else self._halves[1][part],
                enabled=enabled,
                backend=backend,
            )

    def refresh(self) -> None:
        """Make what is computed with equal to the float32 networks, after these were loaded: also what is not trained,
        such as the position embedding and the statistics of batch norms."""
        for master, network in zip(self.masters, self.compute, strict=True):
            if network is not master:
                network.load_state_dict(master.state_dict())

    def optimizer_state(self) -> dict[str, Any]:
        """The moments as torch.optim.AdamW's state dictionary."""
        template = build_optimizer(self.masters[0], self._config.optim).state_dict()
        state = {}
        for index, (slot, step) in enumerate(zip(self.slots, self._steps, strict=True)):
            if step is not None:
                moments = {name: slot.view(getattr(self, name)).clone() for name in ("exp_avg", "exp_avg_sq")}
                state[index] = {"step": step.float(), **moments}
        return {**template, "state": state}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take the moments from AdamW's state dictionary."""
        for buffer in (self.exp_avg, self.exp_avg_sq):
            buffer.zero_()
        self._runs = []
        for index, slot in enumerate(self.slots):
            saved = state["state"].get(index)
            self._steps[index] = None
            if saved is not None:
                self._steps[index] = saved["step"].to(self.parameters.device, torch.int64)
                slot.view(self.exp_avg).copy_(saved["exp_avg"])
                slot.view(self.exp_avg_sq).copy_(saved["exp_avg_sq"])

    def _attach(self, network: nn.Module, buffer: Tensor) -> None:
        """Move the network's trainable parameters into the buffer."""
        for slot in self.slots:
            parameter = network.get_parameter(slot.name)
            view = slot.view(buffer)
            view.copy_(parameter.detach())
            parameter.data = view

    def _plan(self, active: list[bool]) -> None:
        """Group the active slots into runs; a run has a step counter of its own, which its slots share."""
        planned = {index for run in self._runs for index in run.slots}
        if planned == {index for index, used in enumerate(active) if used}:
            return
        counts = [0 if step is None else int(step) for step in self._steps]
        self._runs = []
        keys = [(used, slot.multiplier, count) for used, slot, count in zip(active, self.slots, counts, strict=True)]
        breaks = [0, *(i for i, (a, b) in enumerate(pairwise(keys), start=1) if a != b), len(keys)]
        for first, last in pairwise(breaks):
            if active[first]:
                step = torch.full((), counts[first], dtype=torch.int64, device=self.parameters.device)
                slots = range(first, last)
                self._runs.append(
                    _Run(slots, self.slots[first].offset, self.slots[last - 1].end, self.slots[first].multiplier, step)
                )
                self._steps[first:last] = [step] * len(slots)


def _lay_out(on: CoSANet, config: Config) -> list[_Slot]:
    """The optimiser's parameters one after another: encoder, then heads."""
    names = {id(parameter): name for name, parameter in on.named_parameters()}
    slots: list[_Slot] = []
    for group in build_optimizer(on, config.optim).param_groups:
        for parameter in group["params"]:
            offset = slots[-1].end if slots else 0
            slots.append(_Slot(names[id(parameter)], group["multiplier"], parameter.shape, parameter.stride(), offset))
    return slots
