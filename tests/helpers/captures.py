"""Replaces the capture of CUDA graphs, for tests without a GPU."""

from typing import Any

import pytest
import torch

from llama.accelerate import cuda_graph, gpu


def replace_captures(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Returns a list that gets the output of each captured step.

    A replay computes the step again and copies the result into the output of the capture. Like a graph, it must not
    build tensors from Python data or read from the device. Triton is turned off, because its kernels need a GPU.
    """
    outputs: list[torch.Tensor] = []

    def forbidden(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a captured step reads from the device or builds a tensor from Python data")

    class Capturer:
        def capture(self, step: cuda_graph.Replay) -> cuda_graph.Replay:
            def replay() -> torch.Tensor:
                with pytest.MonkeyPatch.context() as inside:
                    for name in ("tensor", "as_tensor"):
                        inside.setattr(torch, name, forbidden)
                    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
                        inside.setattr(torch.Tensor, name, forbidden)
                    return step()

            step()  # a warm-up, which may compile
            outputs.append(out := replay().clone())
            return lambda: out.copy_(replay())

    patch.setattr(cuda_graph, "Capturer", Capturer)
    patch.setattr(gpu, "triton_kernels", lambda: None)
    return outputs
