"""CUDA tensors without CUDA: shapes, types and devices of everything that a GPU would compute, on any machine.

`FakeTensorMode` knows what each operator gives. A data-dependent call raises in it, an operator without fake
registration does, and so does a CPU tensor among CUDA ones; `Watch` finds those that stay by themselves.
"""

import copy
import ctypes
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
CUDA, META = 1, 14  # c10::DeviceType


class _Mode(FakeTensorMode):
    """One for all: a copied tensor stays in the mode of the one that it is a copy of."""

    def __deepcopy__(self, memo: Any) -> "_Mode":
        return self


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors on `DEVICE` can be made and computed with, without contents."""
    with pytest.MonkeyPatch.context() as patch, _device_guard(), _Mode(allow_non_fake_inputs=False):
        patch.setattr(nn.Module, "to", _converted)
        patch.setattr(Tensor, "pin_memory", lambda self: self)  # the driver locks pages
        yield


@contextmanager
def _device_guard() -> Iterator[None]:
    """A torch without CUDA has no guard for CUDA's devices, which autograd asks for: that of "meta", which does
    nothing, takes its place meanwhile. (A torch with CUDA, but without a GPU, does so itself.)"""
    if torch.backends.cuda.is_built():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("this torch has no CUDA device guard")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, guards[CUDA] = guards[CUDA], guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


def on_cuda(values: Any) -> Any:
    """The same tensors as far as shape, strides and type go, on CUDA."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _without_contents(value).requires_grad_(value.requires_grad)

    return tree_map(convert, values)


def _without_contents(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)


def network_on_cuda(network: nn.Module) -> nn.Module:
    """A network, made on "meta", on CUDA."""
    memo: dict[int, Any] = {id(buffer): _without_contents(buffer) for buffer in network.buffers()}
    memo |= {id(p): nn.Parameter(_without_contents(p), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def _converted(self: nn.Module, *args: Any, memory_format: Any = None, **kwargs: Any) -> nn.Module:
    """nn.Module.to by new parameters: torch's own would swap the contents of fake ones, which it cannot."""
    for module in self.modules():
        for store in (module._parameters, module._buffers):
            for name, value in [(name, value) for name, value in store.items() if value is not None]:
                found = value.detach()
                if args and (value.is_floating_point() or not isinstance(args[0], torch.dtype)):
                    found = found.to(*args, **kwargs)
                if memory_format is not None and found.dim() == 4:
                    found = found.to(memory_format=memory_format)
                is_parameter = isinstance(value, nn.Parameter)
                store[name] = nn.Parameter(found, value.requires_grad) if is_parameter else found
    return self


def backward(root: Tensor) -> dict[Tensor, Tensor]:
    """The gradients of a scalar by leaf. Autograd's own engine asks the driver for a context; its nodes do not."""
    gradients: dict[Any, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    found: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for node in _forward_order(root.grad_fn):
            received = gradients.pop(node, {})
            if hasattr(node, "variable"):
                if received:
                    found[node.variable] = received[0]
                continue
            arguments = [received.get(index) for index in range(len(node._input_metadata))]
            own = isinstance(node, torch.autograd.function.BackwardCFunction)
            sent = node.apply(*arguments) if own else node(*arguments)
            for gradient, (target, index) in zip(
                sent if isinstance(sent, tuple) else (sent,), node.next_functions, strict=False
            ):
                if gradient is None or target is None:
                    continue
                like = target.variable if hasattr(target, "variable") else target._input_metadata[index]
                gradient = gradient.sum_to_size(like.shape).to(like.dtype)
                slots = gradients.setdefault(target, {})
                slots[index] = slots[index] + gradient if index in slots else gradient
    return found


def _forward_order(root: Any) -> Iterable[Any]:
    """The nodes behind a root, each before those that it sends gradients to."""
    order: list[Any] = []
    seen, stack = set(), [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(target, False) for target, _ in node.next_functions]
    return reversed(order)


class Watch(TorchDispatchMode):
    """Collects the calls that see or make a CPU tensor: "operator at file:line"."""

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: list[str] = []
        self.calls = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            place = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
            self.on_cpu.append(f"{func} at {Path(place.filename).name}:{place.lineno}")
        return result
