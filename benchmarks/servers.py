"""Starts servers of one checkpoint, for benchmarks/serve.py and benchmarks/serve_prompts.py: `llama serve`, llama.cpp's
`llama-server` and `transformers serve`. All have as many threads as the machine has processors.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from llama.convert import convert
from llama.tokenizer import Tokenizer, find_tokenizer

ROOT = Path(__file__).resolve().parent.parent
THREADS = os.cpu_count() or 1
SLOT = 1024  # positions for a prompt and its answer


class RequestFailed(Exception):
    """The server refused a request, ended an answer too early, or did not start."""


@contextlib.contextmanager
def started(command: Sequence[str], timeout: float = 120) -> Iterator[str]:
    """Run a server on a free port, which is added to the command -> the URL of its endpoints, once it answers.

    Raises RequestFailed with the end of what it printed if it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            until = time.monotonic() + timeout
            while not _is_healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RequestFailed(f"{command[0]} did not start: {log.read()[-1000:].decode(errors='replace')}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:  # it does not listen yet
        return False


def ours(ckpt_dir: Path, *flags: str, slots: int = 16, length: int = SLOT) -> list[str]:
    sizes = ["--max_batch_size", str(slots), "--max_seq_len", str(length), "--max_queue", "1000"]
    return [sys.executable, "-m", "llama", "serve", "--ckpt_dir", str(ckpt_dir.resolve()), *sizes, *flags]


def no_ends(tokenizer: Tokenizer) -> dict[str, Any]:
    """The field of a request whose answer no id may end."""
    return {"logit_bias": {str(id): -100 for id in sorted(tokenizer.stop_tokens)}}


def servers(options: argparse.Namespace, folder: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name -> command, and fields of all requests. The weights of the others are written to `folder`."""
    ckpt_dir, slots = options.ckpt_dir, max(options.users)
    bias = no_ends(Tokenizer(find_tokenizer(ckpt_dir)))
    kind = ("--dtype", options.dtype)
    found: dict[str, tuple[list[str], dict[str, Any]]] = {
        "llama serve": (ours(ckpt_dir, *kind, slots=slots), bias),
        "llama serve --no-compile": (ours(ckpt_dir, *kind, "--no-compile", slots=slots), bias),
    }
    if options.llama_cpp:
        program, gguf = options.llama_cpp.absolute(), folder / "weights.gguf"
        quantize = program.with_name("llama-quantize")
        command = [quantize, "--allow-requantize", options.gguf, gguf, options.gguf_type, str(THREADS)]
        subprocess.run(command, check=True, capture_output=True)
        sizes = ["--parallel", str(slots), "--ctx-size", str(slots * SLOT), "--threads", str(THREADS)]
        found[f"llama.cpp, {options.gguf_type}"] = ([str(program), "--model", str(gguf), *sizes], bias)
    if options.transformers:
        copy = folder / "hf"
        convert(ckpt_dir, copy, dtype=options.dtype, to="hf")
        for name in ("config.json", "generation_config.json"):
            (copy / name).write_text(json.dumps(json.loads((copy / name).read_text()) | {"eos_token_id": None}))
        # By default it allocates most of the machine's memory for its cache, in blocks of 256 positions.
        batching = ["--continuous-batching", "--cb-num-blocks", str(slots * SLOT // 256)]
        command = [str(options.transformers.absolute()), "serve", str(copy), "--device", "cpu", *kind, *batching]
        found["transformers serve"] = (command, {"model": str(copy)})
    return found
