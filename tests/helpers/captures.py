"""Replaces the capture of CUDA graphs, for tests without a GPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.accelerate import cuda_graph, gpu


class Operators(TorchDispatchMode):
    """Records what a graph would hold: each operator with its numbers, and the addresses of all tensors that are not
    computed in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self._outside, self._computed = set[int](), set[int]()  # addresses

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), *map(self._describe, tree_leaves((args, kwargs or {})))))
        result = func(*args, **(kwargs or {}))
        self._computed.update(map(_address, filter(torch.is_tensor, tree_leaves(result))))
        self._computed -= self._outside  # views
        return result

    def _describe(self, value: Any) -> Any:
        if isinstance(value, torch.ScriptObject):  # a process group, which cannot be compared
            return type(value)
        if not isinstance(value, torch.Tensor):
            return value
        if _address(value) in self._computed:
            return "computed"
        self._outside.add(_address(value))
        return _address(value), value.shape, value.stride(), value.storage_offset()


def _address(tensor: torch.Tensor) -> int:
    return id(tensor) if isinstance(tensor, FakeTensor) else tensor.untyped_storage().data_ptr()


def replace_captures(patch: pytest.MonkeyPatch, *, strict: bool = True) -> list[torch.Tensor]:
    """Returns a list that gets the output of each captured step.

    A replay computes the step again and copies the result into the output of the capture. Like a graph, it must not
    build tensors from Python data or read from the device. Triton is turned off, because its kernels need a GPU.
    strict: it must also consist of the operators that were captured, on the same addresses, as a graph would not see
        anything else. This is not possible for compiled code and for Triton's interpreter.
    """
    outputs: list[torch.Tensor] = []

    def forbidden(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a captured step reads from the device or builds a tensor from Python data")

    class Capturer:
        def capture(self, step: cuda_graph.Replay) -> cuda_graph.Replay:
            def run() -> tuple[torch.Tensor, list[Any]]:
                operators = Operators()
                with pytest.MonkeyPatch.context() as inside, operators if strict else nullcontext():
                    for name in ("tensor", "as_tensor"):
                        inside.setattr(torch, name, forbidden)
                    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
                        inside.setattr(torch.Tensor, name, forbidden)
                    return step(), operators.calls

            def replay() -> torch.Tensor:
                result, calls = run()
                assert calls == captured, "a graph would compute something else"
                return out.copy_(result)

            step()  # a warm-up, which may compile
            first, captured = run()
            outputs.append(out := first.clone())
            return replay

    patch.setattr(cuda_graph, "Capturer", Capturer)
    patch.setattr(gpu, "triton_kernels", lambda: None)
    return outputs
