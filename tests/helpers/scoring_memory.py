"""python scoring_memory.py TOKENIZER DTYPE: peak memory in bytes after hidden_states and after token_logprobs."""

import sys
from pathlib import Path

import torch

from llama import ModelArgs, Tokenizer, Transformer
from llama.engine.engine import Engine
from llama.evaluate.scoring import hidden_states, token_logprobs
from llama.parallel.device import DTYPES
from llama.parallel.groups import connect_ranks, current_world, init_process_groups

ROWS, LENGTH = 2, 4096


def peak() -> int:
    # Not ru_maxrss, which starts at the value of the parent process.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main(tokenizer: str, dtype: torch.dtype) -> None:
    connect_ranks(current_world())
    init_process_groups(current_world(), torch.device("cpu"))
    args = ModelArgs(
        dim=128, n_layers=1, n_heads=2, vocab_size=32000, multiple_of=64, max_seq_len=LENGTH, max_batch_size=ROWS
    )
    torch.set_default_dtype(dtype)
    model = Transformer(args).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    llama = Engine(model, Tokenizer(tokenizer))
    texts = [[(row + 7 * i) % 32000 for i in range(LENGTH)] for row in range(ROWS)]
    for text in texts:
        hidden_states(llama, text)
    before = peak()
    token_logprobs(llama, texts, bos=False)
    print(before, peak())


main(sys.argv[1], DTYPES[sys.argv[2]])
