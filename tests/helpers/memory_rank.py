"""One rank, whose memory tests/checkpoint/test_memory.py measures.

python memory_rank.py                             imports the packages and connects to the other ranks
python memory_rank.py CKPT_DIR TOKENIZER DTYPE    loads, generates, prints {file: bytes of it in memory}
"""

import json
import re
import sys
from pathlib import Path

import torch

from llama import Llama, Transformer, loading
from llama.checkpoint.folder import Checkpoint, Finish
from llama.parallel.groups import connect_ranks, current_world, init_process_groups, shutdown


def touched_bytes() -> dict[str, int]:
    """File name -> bytes of its pages that are mapped into this process, for each checkpoint file."""
    touched: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.rpartition("/")[2]
        elif line.startswith("Rss:") and name.startswith("consolidated."):
            touched[name] = touched.get(name, 0) + int(line.split()[1]) * 1024
    return touched


def main(ckpt_dir: str, tokenizer: str, dtype: str, quantize: str | None = None) -> None:
    touched: dict[str, int] = {}
    load_weights = loading.load_weights

    def load_and_measure(model: Transformer, checkpoint: Checkpoint, dtype: torch.dtype, finish: Finish = None) -> None:
        load_weights(model, checkpoint, dtype, finish)
        touched.update(touched_bytes())  # not later: `build` unmaps the files before it returns

    loading.load_weights = load_and_measure
    llama = Llama.build(ckpt_dir, tokenizer, max_seq_len=16, max_batch_size=1, dtype=dtype, quantize=quantize)
    llama.generate([[1, *range(3, 16)]], max_gen_len=2, temperature=0)  # fills the cache
    llama.close()
    print(json.dumps(touched))


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    elif current_world().size > 1:
        connect_ranks(current_world())
        init_process_groups(current_world(), torch.device("cpu"))
        shutdown()
