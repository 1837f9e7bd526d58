"""benchmarks/compare.py: what it times is the same model everywhere, shown on a small random one."""

import sys
from pathlib import Path

import pytest
import torch
from make_checkpoint import TOKENIZER

from llama.distributed import current_world, join, leave, meet

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare
import sides

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": 512}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_all_sides_hold_the_same_model(tmp_path: Path, kind: str) -> None:
    """Ids of Meta, transformers, llama.cpp where it is installed, and our variants, alone and in a ragged batch."""
    left_out = list[str]()
    sides.write_random(tmp_path / kind, TOKENIZER, SHAPE, kind)
    meet(current_world())
    join(current_world(), torch.device("cpu"))
    found = sides.sides_of(kind, tmp_path / kind, None, 4, left_out.append)
    try:
        assert {"ours", "ours, plain", "Meta", "transformers"} <= {side.name for side in found}, left_out
        compare.check(found, kind, 512)
        prompts = [compare.random_ids(n, 512, n) for n in (3, 9, 20)]
        batches = [side.ragged(prompts, 5) for side in found if side.name != "llama.cpp"]
        assert kind == "bfloat16" or all(batch == batches[0] for batch in batches)

        with torch.inference_mode():
            next(side for side in found if isinstance(side, sides.Meta)).model.output.weight.neg_()
        with pytest.raises(SystemExit, match="Meta goes on like ours after 0 of"):
            compare.check(found, kind, 512)
    finally:
        for side in found:
            if isinstance(side, sides.Ours):
                side.llama.close()
        leave()
