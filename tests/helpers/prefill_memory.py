"""python prefill_memory.py DTYPE LENGTH...: measures by how many bytes a prefill grows a process's anonymous memory.

Prints {length: bytes} as JSON. The model has two layers of the demo model's widths.
"""

import gc
import json
import sys
from typing import Any

import torch

from llama import ModelArgs, Transformer
from llama.accelerate.executor import Executor
from llama.cli import bench
from llama.parallel.device import DTYPES
from llama.parallel.groups import connect_ranks, current_world, init_process_groups

SHAPE: dict[str, Any] = {
    "dim": 576,
    "n_layers": 2,
    "n_heads": 9,
    "n_kv_heads": 3,
    "multiple_of": 256,
    "vocab_size": 8192,
}


def main(dtype: torch.dtype, lengths: list[int]) -> None:
    here = torch.device("cpu")
    connect_ranks(current_world())
    init_process_groups(current_world(), here)
    torch.set_default_dtype(dtype)
    model = Transformer(ModelArgs(**SHAPE, max_seq_len=max(lengths), max_batch_size=1))
    model.requires_grad_(False)
    executor = Executor(model)
    for cache in model.caches:
        cache.clear()  # so that its pages are allocated
    executor.hidden(torch.ones(1, 8, dtype=torch.int64), 0, 8)
    bench.SAMPLE_SECONDS = 0.001
    with bench.peak_memory(here) as before:  # measured once: memory that kernels keep between prefills counts as growth
        pass
    grown = dict.fromkeys(lengths, 0)
    for length in lengths:
        gc.collect()
        with bench.peak_memory(here) as seen:
            executor.logits(executor.hidden(torch.ones(1, length, dtype=torch.int64), 0, length)[:, -1])
        grown[length] = max(grown[length], max(seen) - before[-1])
    print(json.dumps(grown))


main(DTYPES[sys.argv[1]], [int(word) for word in sys.argv[2:]])
