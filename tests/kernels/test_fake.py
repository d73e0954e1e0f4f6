"""Every operator on CUDA tensors without contents: results and gradients have the shapes and types of the definition's,
nothing is read back, nothing lies on the host."""

import pytest
import torch
from fake_cuda import Watch, backward, fake_cuda, on_cuda
from torch import Tensor

from bench.operators.cases import OPERATORS
from bench.operators.scene import Size
from bench.operators.static import tensors
from cosa_fast.kernels.launch.runtime import HAS_TRITON

CPU = torch.device("cpu")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("name", OPERATORS)
def test_results_and_gradients_look_as_the_definitions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.operators.cases.PARAMETERS", 1000)
    problem = OPERATORS[name].problem(Size(3, 2, 32), CPU)
    expected = tensors(problem.function(*problem.arguments, **problem.keywords, backend="reference"))
    with fake_cuda():
        # Inputs in one tree with the arguments that they are among: what is the same stays the same.
        made: dict[int, Tensor] = {}

        def same(value: object) -> object:
            return made.setdefault(id(value), on_cuda(value)) if isinstance(value, Tensor) else value

        arguments = torch.utils._pytree.tree_map(same, list(problem.arguments))
        keywords = torch.utils._pytree.tree_map(same, problem.keywords)
        with Watch() as watch:
            found = tensors(problem.function(*arguments, **keywords))
            assert [(f.shape, f.dtype) for f in found] == [(e.shape, e.dtype) for e in expected]
            assert watch.calls > 0
            if problem.inputs:
                gradients = backward(torch.stack([result.float().sum() for result in found]).sum())
                for value in problem.inputs:
                    gradient = gradients[made[id(value)]]
                    assert (gradient.shape, gradient.dtype) == (value.shape, value.dtype)
        assert watch.on_cpu == []
