"""What this GPU supports: Triton kernels, and matmuls in fp8."""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

log = logging.getLogger(__name__)


@cache
def triton_kernels() -> Any:
    """The module `triton_kernels`. None if there is no GPU, Triton is not installed, or it cannot compile for this GPU
    (it needs a C compiler); only the last reason is logged."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    try:
        from llama.accelerate import triton_kernels as kernels

        kernels.silu_mul(torch.ones(1, 2, device="cuda"))
    except Exception as error:  # of Triton, its compiler, or the driver
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.info(f"llama: Triton does not work on this GPU ({reason}): decoding uses torch's kernels, which is slower")
        return None
    return kernels


def has_fp8(device: torch.device) -> bool:
    """Whether torch and Triton can multiply float8_e4m3fn on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def triton_step() -> Any:
    """The function `triton_step.triton_step`; None where `triton_kernels` returns None."""
    if triton_kernels() is None:
        return None
    from llama.accelerate.triton_step import triton_step as step

    return step
