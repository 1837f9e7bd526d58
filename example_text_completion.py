"""Continue texts: torchrun --nproc_per_node N example_text_completion.py --ckpt_dir DIR"""

from typing import Any

import fire

from llama import Llama
from llama.cli.command import one_line_errors
from llama.cli.output import show

PROMPTS = [
    # The model continues the text.
    "The capital of France is Paris. The capital of Germany is",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils",
    "The three things every garden needs are",
    # Few-shot: the model continues a pattern.
    """\
word: cold, opposite: hot
word: up, opposite: down
word: early, opposite: late
word: full, opposite:""",
]


def main(
    ckpt_dir: str,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int | None = 64,
    max_batch_size: int = 4,
    **options: Any,
) -> None:
    """Continue a few prompts and print the texts, on a terminal while they are generated.

    ckpt_dir: folder with consolidated.NN.pth and params.json. The tokenizer may be in it or in its parent.
    options: those of `Llama.build`, for instance --dtype float32 or --seed 2.
    """
    llama = Llama.build(str(ckpt_dir), tokenizer_path, max_seq_len, max_batch_size, **options)
    pieces = llama.stream_text(PROMPTS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    show(pieces, [f"{prompt}\n> " for prompt in PROMPTS], f"\n{'-' * 40}\n")
    llama.close()


if __name__ == "__main__":
    with one_line_errors():
        fire.Fire(main)
