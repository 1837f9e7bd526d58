"""Out-of-memory errors: recognize those of torch, and raise them again with sizes and with settings that fit.

A single rank can continue with a smaller request afterwards. Several ranks cannot: the others are in the middle of a
forward pass that cannot be completed, and they exit as if this rank had died.
"""

import functools
import re
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Built model -> function that takes torch's out-of-memory error and returns the error to raise instead. `llama.loading`
# adds the functions, because this module does not know which settings fit.
OOM_EXPLAINERS: WeakKeyDictionary[nn.Module, Callable[[BaseException], Exception]] = WeakKeyDictionary()
# Messages of torch, C++, Linux (memory, threads), cuBLAS and oneDNN.
OOM_MESSAGES = (
    "can't allocate memory|out of memory|bad_alloc|[Cc]annot allocate memory|Resource temporarily unavailable|"
    "ALLOC_FAILED|could not create a memory"
)
P = ParamSpec("P")
R = TypeVar("R")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out, or that no more threads can be started."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(OOM_MESSAGES, str(error)))


def explain_oom(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is an Engine. If it runs out of memory and OOM_EXPLAINERS has an
    entry for the engine's model, raise the error that this entry returns."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            engine: Any = args[0]
            explain = OOM_EXPLAINERS.get(engine.model) if is_out_of_memory(error) else None
            if explain is None:
                raise
            traceback.clear_frames(error.__traceback__)  # frees the tensors that its frames reference
            raise explain(error) from None

    return wrapper
