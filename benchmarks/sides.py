"""Four implementations of Llama behind one interface, on the same weights: this runner, Meta's (`llama_models`),
`transformers` and llama.cpp (llama-cpp-python). For benchmarks/compare.py.

All run on the CPU and decode greedily. The peers' packages are imported where they are used, as they need not be
installed. Each peer runs in its own process (`Peer`), so a crash does not end the comparison.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch

from llama import Llama
from llama.checkpoint.layout import OUTPUT, tensor_shapes, without_layer
from llama.convert import convert
from llama.convert.gguf import LAYER_NAMES, NAMES
from llama.parallel.device import DTYPES
from llama.parallel.groups import connect_ranks, current_world, init_process_groups
from llama.params import ModelArgs

CONTEXT = 1024  # max_seq_len of each side
THREADS = os.cpu_count() or 1
# How processes of peers start. After a fork, torch would rely on threads that do not exist in the new process.
START_METHOD = "spawn"
# llama.cpp's type of file for each kind of weights, and its number in llama.h.
FILE_TYPES = {"float32": ("F32", 0), "bfloat16": ("BF16", 32), "int8": ("Q8_0", 7), "int4": ("Q4_0", 2)}


def clock(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Side:
    """An implementation with a loaded model. name: its column of the table."""

    name: str

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """The most probable ids after `prompt`, without end. The first `next` is the prefill, each later one a step."""
        raise NotImplementedError  # each side's own

    def ragged(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """`new` ids for each of several prompts of different lengths, as this implementation computes such a batch."""
        raise NotImplementedError  # each side's own

    def first(self, prompt: list[int], n: int) -> list[int]:
        """The first `n` greedy ids."""
        return list(islice(self.greedy(prompt), n))

    def time_prefill(self, prompt: list[int]) -> float:
        """Seconds to the first id."""
        return clock(lambda: next(self.greedy(prompt)))

    def time_decode(self, prompt: list[int], steps: int) -> float:
        """Seconds for `steps` ids after the first."""
        ids = self.greedy(prompt)
        next(ids)
        return clock(lambda: [next(ids) for _ in range(steps)])

    def time_ragged(self, prompts: list[list[int]], new: int) -> float:
        return clock(lambda: self.ragged(prompts, new))

    def close(self) -> None:
        """Free the model, where garbage collection is not enough."""


class Ours(Side):
    """This runner. rows: max_batch_size. variant: other arguments of `build`."""

    def __init__(self, name: str, folder: Path, dtype: str, rows: int, **variant: Any):
        self.name = name
        sizes: dict[str, Any] = {"max_seq_len": CONTEXT, "max_batch_size": rows}
        self.llama = Llama.build(folder, **sizes, device="cpu", dtype=dtype, **variant)
        self.llama.tokenizer.stop_tokens = set()  # all sides run the same number of steps

    def greedy(self, prompt: list[int], rows: int = 1) -> Iterator[int]:
        """`rows` rows of the same prompt -> the first row's ids."""
        for step in self.llama.stream([prompt] * rows, max_gen_len=None, temperature=0, logprobs=False):
            assert step[0].id is not None
            yield step[0].id

    def time_rows(self, prompt: list[int], rows: int, steps: int) -> float:
        """Seconds for `steps` steps of `rows` rows after the first."""
        ids = self.greedy(prompt, rows)
        next(ids)
        return clock(lambda: [next(ids) for _ in range(steps)])

    def ragged(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self.llama.generate(prompts, new, temperature=0)[0]


class Meta(Side):
    """Meta's `Transformer`. Its generation loop needs a GPU; the model only needs fairscale's groups."""

    def __init__(self, folder: Path, dtype: str):
        from llama_models.llama3.args import ModelArgs as Args
        from llama_models.llama3.model import Transformer

        self.name = "Meta"
        params, weights = meta_folder(folder)
        torch.set_default_dtype(DTYPES[dtype])
        try:
            sizes = {"max_seq_len": CONTEXT, "max_batch_size": 4}
            self.model = Transformer(Args(**{"rope_theta": 10000.0} | params | sizes)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.model.load_state_dict({OUTPUT: weights["tok_embeddings.weight"]} | weights, strict=True)
        if OUTPUT not in weights:
            self.model.output.weight = self.model.tok_embeddings.weight

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        ids, start = torch.tensor([prompt]), 0
        while True:
            logits = self.model(ids, start)
            start += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            yield int(ids)

    def ragged(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Like Meta's `generate`: from the end of the shortest prompt on, one position at a time for all rows. A longer
        prompt keeps its own id there."""
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths) + new), -1)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        start = 0
        for end in range(min(lengths), ids.shape[1]):
            best = self.model(ids[:, start:end], start)[:, -1].argmax(-1)
            ids[:, end] = torch.where(ids[:, end] < 0, best, ids[:, end])
            start = end
        return [row[n : n + new] for row, n in zip(ids.tolist(), lengths, strict=True)]


class Transformers(Side):
    def __init__(self, folder: Path, dtype: str):
        from transformers import LlamaForCausalLM

        self.name = "transformers"
        copy = folder.with_name(f"{folder.name}-hf")
        convert(folder, copy, to="hf")
        self.model = LlamaForCausalLM.from_pretrained(copy, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()
        self.model.generation_config.eos_token_id = None

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        from transformers import DynamicCache

        ids, cache = torch.tensor([prompt]), DynamicCache(config=self.model.config)
        while True:
            with torch.inference_mode():
                logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits.argmax(-1)
            yield int(ids)

    def ragged(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """Padded on the left."""
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.tensor(prompt), 1
        found = self.model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return found[:, -new:].tolist()


class LlamaCpp(Side):
    """llama.cpp with flash attention, which is faster. The cache is float32 for F32 weights, else float16, the default.

    source: the weights as GGUF, by default written from `folder`. It is converted to the file type of `kind`, in the
    folder that contains `folder`. all_logits: keep the logits of every position.
    """

    def __init__(self, folder: Path, kind: str, source: Path | None, all_logits: bool = False):
        llama_cpp = import_module("llama_cpp")  # optional, so mypy may not find it
        self.name = "llama.cpp"
        if source is None:
            source = folder.with_name("written.gguf")
            write_gguf(folder, source)
        label, number = FILE_TYPES[kind]
        path = folder.with_name(f"{label}.gguf")
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread, settings.allow_requantize = number, THREADS, True
        llama_cpp._logger.set_verbose(False)
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(path), ctypes.byref(settings)):
            raise ValueError(f"llama.cpp cannot convert {source} to {label}")
        sizes: dict[str, Any] = {"n_ctx": CONTEXT, "n_batch": 512, "n_threads": THREADS, "n_threads_batch": THREADS}
        if kind == "float32":
            sizes |= {"type_k": 0, "type_v": 0}
        self.model = llama_cpp.Llama(str(path), **sizes, flash_attn=True, logits_all=all_logits, verbose=False)

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        self.model.reset()
        ids, vocab = prompt, self.model.n_vocab()
        while True:
            self.model.eval(ids)
            logits = ctypes.cast(self.model._ctx.get_logits(), ctypes.POINTER(ctypes.c_float * vocab)).contents
            ids = [int(torch.frombuffer(logits, dtype=torch.float32).argmax())]
            yield ids[0]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """[n, vocab] for ids [n]; only with `all_logits`."""
        self.model.reset()
        self.model.eval(ids)
        return torch.from_numpy(self.model.scores[: len(ids)])


def meta_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The params.json and the memory-mapped tensors of a folder of one shard."""
    weights = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
    return json.loads((folder / "params.json").read_text()), weights


def write_gguf(folder: Path, path: Path) -> None:
    """Write a folder of one shard as GGUF, without a vocabulary. Matrices keep their dtype. No weight is permuted, as
    both formats rotate neighbouring pairs."""
    from gguf import GGMLQuantizationType, GGUFWriter

    params, weights = meta_folder(folder)
    args = ModelArgs(**params)
    if args.use_scaled_rope or args.rope_linear_factor is not None:
        raise ValueError("scaled rotary positions are not supported here: pass --gguf")
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    sizes = {"block_count": args.n_layers, "context_length": CONTEXT, "embedding_length": args.dim}
    sizes |= {"feed_forward_length": args.hidden_dim, "vocab_size": args.vocab_size, "head_count": args.n_heads}
    sizes |= {"head_count_kv": args.kv_heads, "key_length": args.head_dim, "value_length": args.head_dim}
    for name, size in (sizes | {"rope_dimension_count": args.head_dim}).items():
        getattr(writer, f"add_{name}")(size)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    theirs = {ours: name for name, ours in (NAMES | LAYER_NAMES).items()}
    for name, weight in weights.items():
        stem = without_layer(name)
        place = f"blk.{name.split('.')[1]}." if stem != name else ""
        weight = weight.float() if weight.dim() == 1 else weight.contiguous()  # llama.cpp requires float32 vectors
        kind = GGMLQuantizationType[{"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[str(weight.dtype)[6:]]]
        # numpy has no bfloat16
        writer.add_tensor(place + theirs[stem], weight.view(torch.uint8).numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random(folder: Path, tokenizer: Path, params: dict[str, Any], dtype: str = "bfloat16") -> None:
    """A Meta folder of random weights (normal, deviation 0.02, seed 1; norms 1), untied."""
    folder.mkdir()
    shutil.copy(tokenizer, folder / ("tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"))
    if (config := tokenizer.with_name("tokenizer_config.json")).is_file():
        shutil.copy(config, folder)
    (folder / "params.json").write_text(json.dumps(params))
    stream, weights = torch.Generator().manual_seed(1), {}
    for name, shape in tensor_shapes(ModelArgs(**params)).items():
        drawn = torch.randn(shape, generator=stream) * 0.02 if len(shape) > 1 else torch.ones(shape)
        weights[name] = drawn.to(DTYPES[dtype])
    torch.save(weights, folder / "consolidated.00.pth")


class PeerFailed(Exception):
    """A peer's process exited, or the peer raised an exception; the message names the signal or the exception."""


class Peer(Side):
    """A side in its own process, which runs and times it; calls and results go through a pipe.

    make: creates the side in that process; must be picklable. Raises ImportError if the peer's package is not
    installed. The constructor and every method raise PeerFailed if the peer fails. After an exception the peer can be
    called again, unless its process has exited.
    """

    def __init__(self, name: str, make: Callable[[], Side]):
        self.name = name
        self._ended = ""
        context: Any = multiprocessing.get_context(START_METHOD)  # typeshed's base class lacks Process
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, torch.get_num_threads()), daemon=True)
        try:
            self._process.start()
        except OSError as error:  # no memory for another process
            raise PeerFailed(_in_short(error)) from error
        theirs.close()  # so that reading fails when the process has exited
        try:
            if missing := self._receive():
                raise ImportError(missing)
        except BaseException:
            self.close()
            raise

    def first(self, prompt: list[int], n: int) -> list[int]:
        return self._call("first", prompt, n)

    def ragged(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return self._call("ragged", prompts, new)

    def time_prefill(self, prompt: list[int]) -> float:
        return self._call("time_prefill", prompt)

    def time_decode(self, prompt: list[int], steps: int) -> float:
        return self._call("time_decode", prompt, steps)

    def time_ragged(self, prompts: list[list[int]], new: int) -> float:
        return self._call("time_ragged", prompts, new)

    def close(self) -> None:
        """End the process, which frees its memory."""
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()
        self._ended = self._ended or "closed"

    def _call(self, method: str, *args: Any) -> Any:
        if self._ended:
            raise PeerFailed(f"had ended: {self._ended}")
        try:
            self._pipe.send((method, args))
        except OSError:
            self._fail()
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self._fail()
        if error:
            raise PeerFailed(error)
        return answer

    def _fail(self) -> NoReturn:
        self._process.join()
        self._ended = _how_it_ended(self._process.exitcode or 0)
        raise PeerFailed(self._ended)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _serve(pipe: Connection, make: Callable[[], Side], threads: int) -> None:
    """Run in the peer's process until the pipe is closed. Sends (result, "") or (None, what was raised)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends this
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        try:
            side = make()
        except ImportError as error:
            return pipe.send((str(error) or "not installed", ""))
        except Exception as error:
            return pipe.send((None, _in_short(error)))
        pipe.send((None, ""))
        while True:
            method, args = pipe.recv()
            try:
                answer = getattr(side, method)(*args), ""
            except Exception as error:
                answer = None, _in_short(error)
            pipe.send(answer)


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def in_meta_groups(folder: Path, dtype: str) -> Side:
    """Meta's side, in a process without a model of ours. Its layers need fairscale's groups, which are created here."""
    connect_ranks(current_world())
    init_process_groups(current_world(), torch.device("cpu"))
    return Meta(folder, dtype)


def peers_of(kind: str, folder: Path, gguf: Path | None) -> dict[str, Callable[[], Side]]:
    """Name -> function that creates the peer, for each peer that supports weights of this kind."""
    makers: dict[str, Callable[[], Side]] = {}
    if not kind.startswith("int"):
        makers["Meta"] = partial(in_meta_groups, folder, kind)
        makers["transformers"] = partial(Transformers, folder, kind)
    return makers | {"llama.cpp": partial(LlamaCpp, folder, kind, gguf)}


def sides_of(
    kind: str,
    folder: Path,
    gguf: Path | None,
    rows: int,
    skip: Callable[[str], None],
    failed: Callable[[str, str], None],
) -> list[Side]:
    """All implementations for float32, bfloat16, int8 or int4, ours first, each peer in its own process.

    rows: max_batch_size of ours. skip: called with a line for each implementation that is left out. failed: called with
    name and reason for each peer that failed while it was created.
    """
    dtype = "float32" if kind == "float32" else "bfloat16"
    quantized: dict[str, Any] = {"quantize": kind} if kind.startswith("int") else {}
    makers: dict[str, Callable[[], Side]] = {
        "ours": lambda: Ours("ours", folder, dtype, rows, **quantized),
        "ours, eager": lambda: Ours("ours, eager", folder, dtype, rows, compile=False, **quantized),
    }
    if not quantized:
        makers["ours, plain"] = lambda: Ours("ours, plain", folder, dtype, rows, plain=True)
    for name, make in peers_of(kind, folder, gguf).items():
        makers[name] = partial(Peer, name, make)
    found = []
    for name, make in makers.items():
        try:
            found.append(make())
        except PeerFailed as error:
            failed(name, str(error))
        except (ImportError, TypeError, ValueError, RuntimeError) as error:
            if name == "ours" and not quantized:
                raise
            skip(f"{kind}: {name} is left out ({str(error).splitlines()[0]})")
    return found
