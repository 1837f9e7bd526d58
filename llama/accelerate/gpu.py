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


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether torch and Triton can multiply float8_e4m3fn on this device, with a scale for each row."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(32, 16, device=device)
    x, weight = ones.to(torch.float8_e4m3fn), ones[:16].to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(x, weight.t(), scale_a=ones[:, :1], scale_b=ones[:1], out_dtype=torch.bfloat16)
        torch.cuda.synchronize(device)
    except RuntimeError:  # older versions of torch have no such kernel for some GPUs
        return False
    return True
