"""One rank, for test_memory.py: import and stop, or load a checkpoint and generate; prints what it saw as JSON.

python memory_rank.py                        imports the packages and joins the other ranks, no more
python memory_rank.py CKPT_DIR TOKENIZER DTYPE
"""

import json
import os
import re
import sys
from pathlib import Path

OPENED: set[str] = set()


def watch_files(event: str, args: tuple[object, ...]) -> None:
    """Audit hook: remember each checkpoint file that is opened, by whatever part of Python."""
    if event == "open" and str(args[0]).endswith(".pth"):
        OPENED.add(os.path.basename(str(args[0])))


sys.addaudithook(watch_files)

import torch  # noqa: E402

from llama import Llama, completion  # noqa: E402
from llama.distributed import current_world, join, leave  # noqa: E402


def touched_pages() -> dict[str, int]:
    """File name -> bytes of its pages that are mapped into this process."""
    touched: dict[str, int] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.rpartition("/")[2]
        elif line.startswith("Rss:") and name.endswith(".pth"):
            touched[name] = touched.get(name, 0) + int(line.split()[1]) * 1024
    return touched


def main() -> None:
    if len(sys.argv) == 1:
        join(current_world(), torch.device("cpu"))
        leave()
        return
    ckpt_dir, tokenizer, dtype = sys.argv[1:]
    touched: dict[str, int] = {}
    load_weights = completion.load_weights

    def load_and_look(*args: object) -> None:
        load_weights(*args)  # type: ignore[arg-type]
        touched.update(touched_pages())  # the files are unmapped when `build` returns

    completion.load_weights = load_and_look  # type: ignore[assignment]
    llama = Llama.build(ckpt_dir, tokenizer, max_seq_len=64, max_batch_size=2, dtype=dtype)
    rows, _ = llama.generate([list(range(3, 59)), list(range(4, 60))], max_gen_len=8, temperature=0)
    llama.close()
    print(json.dumps({"opened": sorted(OPENED), "touched": touched, "rows": rows}))


main()
