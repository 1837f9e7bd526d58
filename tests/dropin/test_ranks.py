"""Programs for several ranks that were written for Meta's packages."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from helpers.paths import ROOT
from helpers.ranks import run_ranks, torchrun
from llama import Llama


def serve(folder: Path) -> list[Any]:
    """A server whose ranks wait in the default group until rank 0 has a request for them."""
    os.environ["LLAMA_TIMEOUT"] = "6"  # the package's own process group times out after a third of that
    llama = Llama.build(folder)
    rank, answers = dist.get_rank(), list[str]()
    started = time.monotonic()
    for pause, prompt in ((5, "The licence"), (0, "You may"), (0, None)):
        request = [None]
        if rank == 0:
            time.sleep(pause)
            request = [prompt]  # type: ignore[list-item]
        dist.broadcast_object_list(request, src=0)
        if request[0] is None:
            break
        answers.append(llama.text_completion([request[0]], temperature=0, max_gen_len=4)[0]["generation"])
    waited = time.monotonic() - started
    llama.close()
    return [answers, waited >= 5]


def test_ranks_wait_in_the_default_group_for_the_next_request(checkpoint: Callable[..., Path]) -> None:
    first, second = run_ranks(2, serve, checkpoint("mha"), timeout=60)
    assert first == second
    answers, waited = first
    assert len(answers) == 2 and all(answers) and waited


PRINTING = """
import sys
from llama import Llama

def answer():
    llama = Llama.build(sys.argv[1])
    for answer in llama.text_completion(["The licence"], temperature=0, max_gen_len=4):
        print("ANSWER", answer["generation"])
    return llama

llama = answer()
print("EVERYWHERE", file=sys.__stdout__)
llama.close()
print("CLOSED")
sys.stdout = open(2, "w", closefd=False)
answer().close()
"""


@pytest.mark.slow
def test_print_prints_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRINTING)
    done = torchrun(2, str(script), str(checkpoint("mha")), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    # Counts words, not lines, because the lines of two ranks may be interleaved.
    assert [done.stdout.count(line) for line in ("ANSWER", "EVERYWHERE", "CLOSED")] == [1, 2, 2], done.stdout
    assert done.stderr.count("ANSWER") == 2, done.stderr  # a program's own sys.stdout prints on every rank
