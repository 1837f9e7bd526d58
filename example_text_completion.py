"""Continue texts: torchrun --nproc_per_node N example_text_completion.py --ckpt_dir DIR"""

from llama import Llama
from llama.cli.main import run
from llama.cli.output import show

PROMPTS = [
    # Plain continuation: the model goes on where the text stops.
    "The capital of France is Paris. The capital of Germany is",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils",
    "The three things every garden needs are",
    # Few-shot: a pattern to carry on.
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
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    compile: bool | str = "auto",
    plain: bool = False,
    seed: int = 1,
) -> None:
    """Continue a few prompts and print them, on a terminal as they come.

    ckpt_dir: folder with consolidated.NN.pth and params.json; the tokenizer is looked for in it and beside it.
    """
    llama = Llama.build(
        ckpt_dir,
        tokenizer_path,
        max_seq_len,
        max_batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        plain=plain,
    )
    pieces = llama.stream_text(PROMPTS, temperature=temperature, top_p=top_p, max_gen_len=max_gen_len)
    show(pieces, [f"{prompt}\n> " for prompt in PROMPTS], f"\n{'-' * 40}\n")
    llama.close()


if __name__ == "__main__":
    run(main)
