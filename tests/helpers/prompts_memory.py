"""The memory of `complete --file`, for tests/cli/test_hostile.py.

python prompts_memory.py CKPT_DIR FILE OUT     prints the peak growth of the command's anonymous memory in bytes
"""

import sys
import threading
import time

from helpers.commands import call
from helpers.rss import anonymous_bytes
from llama import Llama
from llama.cli import complete


def main(ckpt_dir: str, file: str, out: str) -> None:
    build, grown = Llama.build, [0]

    def built(*args: object, **kwargs: object) -> Llama:
        llama = build(*args, **kwargs)  # type: ignore[arg-type]  # the command's own arguments
        llama.text_completion(["x"], max_gen_len=1)
        before = anonymous_bytes()

        def watch() -> None:
            while True:
                grown[0] = max(grown[0], anonymous_bytes() - before)
                time.sleep(0.005)

        threading.Thread(target=watch, daemon=True).start()
        return llama

    Llama.build = staticmethod(built)  # type: ignore[method-assign]
    call(complete.complete, ckpt_dir=ckpt_dir, file=file, out=out, keep_going=True, max_gen_len=1, max_seq_len=64)
    print(grown[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
