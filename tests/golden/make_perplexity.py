"""What transformers says of text.txt: writes perplexity.json.

    python tests/golden/make_perplexity.py HF_FOLDER

HF_FOLDER: the demo model in float32, from its GGUF file: python -m llama convert GGUF META_FOLDER --dtype float32, then
python -m llama convert META_FOLDER HF_FOLDER --to hf
Windows are those of lm-evaluation-harness; the first id, which nothing predicts, is not scored. Of the whole text, and
of its first lines, which the tests have time for. About three minutes.
"""

import json
import math
import sys
from pathlib import Path

import torch
import transformers
from lm_eval.utils import get_rolling_token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
LENGTH, LINES = 512, 110


def figures(model: torch.nn.Module, ids: list[int]) -> dict[str, float]:
    nll = 0.0
    for given, scored in get_rolling_token_windows(ids[1:], prefix_token=ids[0], max_seq_len=LENGTH, context_len=1):
        with torch.inference_mode():
            logits = model(torch.tensor([given])).logits[0, -len(scored) :]
        logprobs = logits.double().log_softmax(dim=-1)
        nll -= float(logprobs.gather(-1, torch.tensor(scored)[:, None]).sum())
    return {"tokens": len(ids) - 1, "nll": nll, "perplexity": math.exp(nll / (len(ids) - 1))}


def main(folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (HERE / "text.txt").read_text("utf-8").splitlines(keepends=True)
    answer = {
        "made_by": f"transformers {transformers.__version__}, float32",
        "max_seq_len": LENGTH,
        "lines": LINES,
        "first_lines": figures(model, tokenizer.encode("".join(lines[:LINES]))),
        "whole": figures(model, tokenizer.encode("".join(lines))),
    }
    (HERE / "perplexity.json").write_text(json.dumps(answer, indent=1) + "\n")
    print(answer)


main(sys.argv[1])
