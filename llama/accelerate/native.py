"""Compiles native.c with the machine's C compiler and calls it on a model's tensors.

Compiling takes a few seconds and is done once: the library is saved in the user's cache folder, named by a hash of the
source, the compiler and the CPU.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import nn

from llama.accelerate.linear import BLOCK_ROWS, linear
from llama.accelerate.quantize import GROUP, MAX_GEMV_ROWS, Int4, QuantizedLinear
from llama.cache import KVCache, Rows, row_tensor
from llama.parallel.device import cache_folder, processor
from llama.parallel.groups import model_parallel

SOURCE = Path(__file__).with_name("native.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # the enum of native.c
INT8, INT4 = 2, 3
PADDING = 32  # the columns that native.c may add to a row of `operands`, twice its LANES or less
# Tried in this order until one compiles. Without OpenMP (Apple's clang) the code runs in one thread.
FLAGS = (["-O3", "-march=native", "-fopenmp"], ["-O3", "-mcpu=native", "-fopenmp"], ["-O3", "-march=native"], ["-O3"])


# The structs of native.c ---------------------------------------------------------------------------


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "zero")),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("wqkv", "wo", "w13", "w2")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "ffn_norm", "keys", "values")),
    ]


REDUCE = ctypes.CFUNCTYPE(ctypes.c_int)
SIZES = ("n_layers", "dim", "heads", "kv_heads", "head_dim", "width", "max_seq_len", "cache_kind")
BUFFERS = ("h", "qkv", "scores", "attended", "gate_up", "activations", "sums", "out")


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("norm_eps", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "freqs_cis", *BUFFERS, "operands")),
        ("reduce", REDUCE),
    ]


class AttentionArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bsz", "seqlen", "heads", "kv_heads", "head_dim", "max_seq_len")),
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "starts", "slots")),
    ]


# Compiling ----------------------------------------------------------------------------------------


class NoCompilerError(RuntimeError):
    """There is no C compiler, it cannot compile native.c, or the library cannot be stored safely; the message says
    which."""


def compile_library() -> bool:
    """Compile native.c unless the library exists already. Returns whether it compiled. Raises NoCompilerError."""
    try:
        path, compiler = _library_path()
    except FileNotFoundError as error:
        raise NoCompilerError(str(error)) from error
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_safe = only_we_can_write(path.parent)
    except OSError as error:
        raise NoCompilerError(f"{path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    if not is_safe:
        raise NoCompilerError(
            f"{path.parent} can be written by others, whose code would run: chmod 700, or set XDG_CACHE_HOME"
        )
    if path.exists() and only_we_can_write(path):
        return False
    _compile(compiler, path)
    return True


def only_we_can_write(path: Path) -> bool:
    """Whether only this user and root can have written the file or folder. Parent folders are not checked."""
    if os.name != "posix":
        return True
    status = path.lstat()
    return status.st_uid == os.geteuid() and not (stat.S_ISLNK(status.st_mode) or status.st_mode & 0o022)


def _library_path() -> tuple[Path, str]:
    """The path of the library, and the compiler.

    Raises NoCompilerError without a compiler, FileNotFoundError without a cache folder.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise NoCompilerError(f"no C compiler found ({', '.join(names)})")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, version, processor()]).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{key}.so", compiler


@cache
def library_name() -> str:
    """ "native-" and a hash of what the library was compiled from. Raises NoCompilerError, FileNotFoundError."""
    return _library_path()[0].stem


@cache
def library() -> ctypes.CDLL:
    """The library. `compile_library` must have compiled it."""
    lib = ctypes.CDLL(str(_library_path()[0]))
    lib.decode.argtypes = [ctypes.POINTER(Model)] + [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
    lib.multiply.argtypes = [ctypes.POINTER(Matrix)] + [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int]
    lib.attend_all.argtypes = [ctypes.POINTER(AttentionArgs), ctypes.c_int]
    lib.dequantize.argtypes = [ctypes.POINTER(Matrix), ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return lib


def _compile(compiler: str, path: Path) -> None:
    try:
        # Several ranks may compile at once. Each writes its own file, and the last one to finish replaces the library.
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise NoCompilerError(f"{path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    os.close(handle)
    temporary = Path(name)
    try:
        for flags in FLAGS:
            command = [compiler, *flags, "-shared", "-fPIC", "-o", name, str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                temporary.chmod(0o700)  # the linker creates a new file, with the umask's permissions
                temporary.replace(path)
                return
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
        raise NoCompilerError(f"{compiler} cannot compile {SOURCE} ({reason.strip()})")
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def release_freed_memory() -> Iterator[None]:
    """Context manager in which freed blocks of over 1 MB are returned to the system.

    glibc would otherwise keep blocks of up to 32 MB for reuse, which add up to the size of the model while its layers
    are quantized. With other C libraries, which have no such setting, nothing is changed.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:  # the highest thresholds that glibc itself would set: blocks are reused again, which saves page faults
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


# Attention and matmuls ----------------------------------------------------------------------------


def attend(q: torch.Tensor, kv_cache: KVCache, start_pos: int | torch.Tensor, rows: Rows) -> torch.Tensor:
    """Causal attention in bfloat16 over a cache that already holds the queries' own positions.

    q and result: [bsz, seqlen, heads, head_dim]. start_pos: position of the first queries, one int or [bsz]. rows: the
    cache rows, as `KVCache.rows` returns and checks them.
    """
    bsz, seqlen, heads, head_dim = q.shape
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = torch.as_tensor(start_pos).expand(bsz).contiguous()
    kv_heads, max_seq_len = kv_cache.k.shape[1:3]
    sizes = bsz, seqlen, heads, kv_heads, head_dim, max_seq_len
    slots = row_tensor(rows, q.device)
    pointers = (tensor.data_ptr() for tensor in (q, kv_cache.k, kv_cache.v, out, starts, slots))
    library().attend_all(AttentionArgs(*sizes, *pointers), torch.get_num_threads())
    return out


def matrix(weight: torch.Tensor) -> Matrix:
    """The struct for a row-major weight [n, k], which native.c reads in place."""
    return Matrix(KINDS[weight.dtype], *weight.shape, weight.data_ptr(), None, None)


def multiply(w: Matrix, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [.., k] -> [.., n] in x's dtype.

    dtype: the model's. If it is bfloat16, x is rounded to int16 for a quantized weight. For a bfloat16 weight, several
    rows of x are rounded to bfloat16 if the CPU multiplies such numbers.
    """
    rows = x.reshape(-1, w.k).float().contiguous()
    m = len(rows)
    y = torch.empty(m, w.n)
    sums = torch.empty(m * (w.k // GROUP + 1))
    operands = torch.empty(m * (w.k + PADDING)) if dtype == torch.bfloat16 else None
    pointers = rows.data_ptr(), sums.data_ptr(), _pointer(operands), y.data_ptr()
    library().multiply(w, *pointers, m, torch.get_num_threads())
    return y.view(*x.shape[:-1], w.n).to(x.dtype)


def linear_blocks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.linear for many rows, in blocks that fit into the CPU's cache: x [.., k], weight [n, k] -> [.., n]."""
    w = matrix(weight)
    y = x.new_empty(*x.shape[:-1], w.n)
    for rows, out in zip(x.reshape(-1, w.k).split(BLOCK_ROWS), y.view(-1, w.n).split(BLOCK_ROWS), strict=True):
        out.copy_(multiply(w, rows, weight.dtype))
    return y


def _pointer(buffer: torch.Tensor | None) -> int | None:
    return None if buffer is None else buffer.data_ptr()


class NativeQuantizedLinear(nn.Module):
    """A quantized weight in the layout of native.c, which multiplies few rows by it: x [.., k] -> [.., n]."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.dtype, self.bits, self.n, self.k = layer.dtype, layer.bits, layer.n, layer.k
        if isinstance(layer, Int4):
            kind, data = INT4, _to_panels(_interleave_columns(layer.data), 4)
            scales = [_to_panels(layer.scale, 1), _to_panels(layer.zero, 1)]
        else:
            kind, data, scales = INT8, _to_panels(layer.data, 2), [_to_panels(layer.scale[:, None], 1)]
        for name, buffer in zip(("data", "scale", "zero"), (data, *scales), strict=False):
            self.register_buffer(name, buffer)
        pointers = [buffer.data_ptr() for buffer in (data, *scales)]
        self.matrix = Matrix(kind, layer.n, layer.k, *pointers)

    def extra_repr(self) -> str:
        return f"{self.n} x {self.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() // self.k > MAX_GEMV_ROWS:
            return linear(x, self.dequantize(x.dtype))
        return multiply(self.matrix, x, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in `dtype` (default: the model's), [n, k]."""
        dtype = dtype or self.dtype
        out = torch.empty(self.n, self.k, dtype=dtype)
        library().dequantize(self.matrix, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
        return out


def _to_panels(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[n, k] -> [n / panel, k / width, panel, width]; the last panel is padded with rows of zeros."""
    n, k = rows.shape
    panel = library().panel_rows()
    padded = F.pad(rows, (0, 0, 0, -n % panel)) if n % panel else rows
    return padded.view(-1, panel, k // width, width).transpose(1, 2).contiguous()


def _interleave_columns(data: torch.Tensor) -> torch.Tensor:
    """Reorder `Int4.data` [n, k / 2]: each four bytes hold eight neighbouring columns, in the order 0 2, 4 6, 1 3, 5 7,
    low bits first."""
    groups = data.view(len(data), -1, 1, GROUP // 2)
    q = torch.cat((groups & 15, groups >> 4), dim=2).view(len(data), -1, 2, 2, 2)  # [n, k / 8, .., ..,  even or odd]
    return (q[..., 0, :] | q[..., 1, :] << 4).transpose(-1, -2).flatten(1)


# The decode step ----------------------------------------------------------------------------------


class NativeDecoder:
    """A decode step through all layers by native.c: ids [bsz, 1] -> hidden states [bsz, 1, dim], fp32.

    layers: `fused.FusedLayer`s of one shape. Weights and caches are read where the model stores them.
    slots: the cache row of each row of the ids; None: the first rows. ctx_len is not used;
    each row attends up to its own position.
    """

    def __init__(self, model: Any, layers: Sequence[Any]):
        first = layers[0]
        heads, kv_heads, head_dim = first.n_local_heads, first.n_local_kv_heads, first.head_dim
        dim, width = len(model.norm.weight), _struct(first.w2).k
        max_rows, _, max_seq_len, _ = first.cache.k.shape
        widest = max(dim, heads * head_dim, width)
        widths = {
            "h": dim,
            "qkv": (heads + 2 * kv_heads) * head_dim,
            "scores": heads * max_seq_len,
            "attended": heads * head_dim,
            "gate_up": 2 * width,
            "activations": width,
            "sums": widest // GROUP + 1,
            "out": dim,
        }
        self.model, self.cache = model, first.cache
        self.buffers = {name: torch.zeros(max_rows, size) for name, size in widths.items()}
        is_bfloat16 = first.cache.k.dtype == torch.bfloat16
        self.operands = torch.zeros(max_rows, widest + PADDING) if is_bfloat16 else None
        self.failure: BaseException | None = None
        self.rows = 0
        self.layers = (Layer * len(layers))(*map(self._layer, layers))
        pointers = {name: buffer.data_ptr() for name, buffer in self.buffers.items()}
        self.struct = Model(
            *(len(layers), dim, heads, kv_heads, head_dim, width, max_seq_len),
            KINDS[first.cache.k.dtype],
            model.norm.eps,
            self.layers,
            model.norm.weight.data_ptr(),
            None,
            **pointers,
            operands=_pointer(self.operands),
            reduce=REDUCE(self._reduce) if model_parallel()[1] > 1 else REDUCE(),
        )

    def __call__(
        self, tokens: torch.Tensor, start_pos: int | torch.Tensor, ctx_len: int, slots: Sequence[int] | None
    ) -> torch.Tensor:
        self.rows = len(tokens)
        cache_rows = row_tensor(self.cache.rows(slots, self.rows), tokens.device)
        x = self.model.tok_embeddings(tokens).float().contiguous()  # [bsz, 1, dim]
        positions = torch.as_tensor(start_pos).expand(self.rows).contiguous()
        angles = self.model.freqs_cis.to(torch.complex64).contiguous()
        # Check sizes here: native.c does not know them, and the user may have replaced these tensors.
        last, capacity, pairs = int(positions.max()), self.struct.max_seq_len, self.struct.head_dim // 2
        if last >= capacity:
            raise ValueError(f"position {last}, but the cache has {capacity}: raise max_seq_len")
        if x.shape[-1] != self.struct.dim:
            raise ValueError(f"the embeddings have {x.shape[-1]} features, but the layers expect {self.struct.dim}")
        if angles.dim() != 2 or len(angles) <= last or angles.shape[1] != pairs:
            raise ValueError(f"freqs_cis has shape {tuple(angles.shape)}, expected [over {last}, {pairs}]")
        self.struct.freqs_cis = angles.data_ptr()
        threads = torch.get_num_threads()
        pointers = x.data_ptr(), positions.data_ptr(), cache_rows.data_ptr()
        if library().decode(self.struct, *pointers, self.rows, threads) and self.failure:
            raise self.failure
        return x

    def _reduce(self) -> int:
        # Called from C, so an exception cannot propagate from here: `__call__` raises it.
        try:
            dist.all_reduce(self.buffers["out"][: self.rows], group=get_model_parallel_group())
        except BaseException as error:
            self.failure = error
            return 1
        return 0

    def _layer(self, layer: Any) -> Layer:
        return Layer(
            *map(_struct, (layer.wqkv, layer.wo, layer.w13, layer.w2)),
            *(norm.weight.data_ptr() for norm in (layer.attention_norm, layer.ffn_norm)),
            *(layer.cache.k.data_ptr(), layer.cache.v.data_ptr()),
        )


def _struct(linear: Any) -> Matrix:
    return linear.matrix if isinstance(linear, NativeQuantizedLinear) else matrix(linear.weight)
