"""Memory that runs out in the middle of a step, reported as `llama.memory.check` does it: the numbers, and what fits.

One rank can go on with less. Of several the others are in the middle of the step, and end.
"""

import functools
import re
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

# A model -> the error to raise for torch's.
EXPLAIN: WeakKeyDictionary[nn.Module, Callable[[BaseException], Exception]] = WeakKeyDictionary()
# Of torch, C++, Linux (memory, threads), cuBLAS and oneDNN.
WORDS = (
    "can't allocate memory|out of memory|bad_alloc|[Cc]annot allocate memory|Resource temporarily unavailable|"
    "ALLOC_FAILED|could not create a memory"
)
P = ParamSpec("P")
R = TypeVar("R")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(WORDS, str(error)))


def explain_oom(step: Callable[P, R]) -> Callable[P, R]:
    """For functions and methods of an Engine, which they take first."""

    @functools.wraps(step)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return step(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            engine: Any = args[0]
            explain = EXPLAIN.get(engine.model) if is_out_of_memory(error) else None
            if explain is None:
                raise
            traceback.clear_frames(error.__traceback__)  # which would hold what the step had made so far
            raise explain(error) from None

    return told
