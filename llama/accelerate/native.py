"""native.c from Python: compiled by the machine's C compiler, its structs filled from a model's tensors.

Compiling takes a few seconds and is done once: the library is kept in the user's cache, under a name made from the
source, the compiler and the processor.
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

from llama.accelerate.linear import linear
from llama.accelerate.quantize import FEW_ROWS, GROUP, Int4, Quantized
from llama.cache import KVCache
from llama.parallel.device import cache_folder, processor
from llama.parallel.groups import model_parallel

SOURCE = Path(__file__).with_name("native.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1}  # as in native.c; 2 and 3 are int8 and int4
# Where there is no OpenMP (Apple's clang) one thread does all.
FLAGS = (["-O3", "-march=native", "-fopenmp"], ["-O3", "-mcpu=native", "-fopenmp"], ["-O3", "-march=native"], ["-O3"])


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
BUFFERS = ("h", "qkv", "scores", "attended", "gates", "products", "sums", "out")


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("norm_eps", ctypes.c_float),
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("norm", "freqs_cis", *BUFFERS, "halves")),
        ("reduce", REDUCE),
    ]


class Block(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("bsz", "seqlen", "heads", "kv_heads", "head_dim", "max_seq_len")),
        *((name, ctypes.c_void_p) for name in ("q", "keys", "values", "out", "starts")),
    ]


class NoCompilerError(RuntimeError):
    """There is no C compiler, or it cannot compile native.c, or what it makes cannot be kept safely; the message says
    which."""


def compile_library() -> bool:
    """Compile native.c unless that was done before; True if it was not. Raises NoCompilerError."""
    try:
        path, compiler = _place()
    except FileNotFoundError as error:
        raise NoCompilerError(str(error)) from error
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        safe = _ours_alone(path.parent)
    except OSError as error:
        raise NoCompilerError(f"{path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    if not safe:
        raise NoCompilerError(
            f"{path.parent} can be written by others, whose code would run: chmod 700, or set XDG_CACHE_HOME"
        )
    if path.exists() and _ours_alone(path):
        return False
    _compile(compiler, path)
    return True


def _ours_alone(path: Path) -> bool:
    """Whether nobody else but root can have written it. The folders above are taken on trust."""
    if os.name != "posix":
        return True
    found = path.lstat()
    return found.st_uid == os.geteuid() and not (stat.S_ISLNK(found.st_mode) or found.st_mode & 0o022)


def _place() -> tuple[Path, str]:
    """Where the compiled code is kept, and the compiler."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise NoCompilerError(f"no C compiler here ({', '.join(names)})")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, version, processor()]).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{key}.so", compiler


@cache
def library() -> ctypes.CDLL:
    """native.c as machine code, compiled before."""
    loaded = ctypes.CDLL(str(_place()[0]))
    loaded.decode.argtypes = [ctypes.POINTER(Model)] + [ctypes.c_void_p] * 2 + [ctypes.c_int64, ctypes.c_int]
    loaded.multiply.argtypes = [ctypes.POINTER(Matrix)] + [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int]
    loaded.attend_all.argtypes = [ctypes.POINTER(Block), ctypes.c_int]
    loaded.dequantize.argtypes = [ctypes.POINTER(Matrix), ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return loaded


def _compile(compiler: str, path: Path) -> None:
    try:
        # Several ranks may be doing the same: each writes a file of its own, and the last one to finish stays.
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise NoCompilerError(f"{path.parent} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    os.close(handle)
    made = Path(name)
    try:
        for flags in FLAGS:
            command = [compiler, *flags, "-shared", "-fPIC", "-o", name, str(SOURCE), "-lm"]
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode == 0:
                made.chmod(0o700)  # a linker makes a new file, with the rights that the umask gives
                made.replace(path)
                return
        reason = next((line for line in ended.stderr.splitlines() if "error" in line), "no reason given")
        raise NoCompilerError(f"{compiler} cannot compile {SOURCE} ({reason.strip()})")
    finally:
        made.unlink(missing_ok=True)


@contextlib.contextmanager
def release_freed_memory() -> Iterator[None]:
    """Inside, what is freed in blocks of over 1 MB goes back to the system: glibc would keep blocks of up to 32 MB for
    later, a model's worth of them while its layers take other forms. Other C libraries have no such setting."""
    mmap_threshold, trim_threshold = -3, -1  # glibc's numbers for them
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(mmap_threshold, 2**20)
    try:
        yield
    finally:  # where glibc ends up by itself: small enough blocks are kept, and kernels need not ask for pages
        mallopt(mmap_threshold, 2**25)
        mallopt(trim_threshold, 2**26)


# From tensors to structs --------------------------------------------------------------------------


def _if_halves(buffer: torch.Tensor) -> int | None:
    return buffer.data_ptr() if buffer.dtype == torch.bfloat16 else None


def attend(q: torch.Tensor, cache_: KVCache, start_pos: int | torch.Tensor) -> torch.Tensor:
    """Causal attention over a cache that has the queries' own positions already, in bfloat16: [bsz, seqlen, heads,
    head_dim] -> as q. start_pos: of the first queries, one int or [bsz]."""
    bsz, seqlen, heads, head_dim = q.shape
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = torch.as_tensor(start_pos).expand(bsz).contiguous()
    kv_heads, max_seq_len = cache_.k.shape[1:3]
    sizes = bsz, seqlen, heads, kv_heads, head_dim, max_seq_len
    pointers = (
        tensor.data_ptr() for tensor in (q, cache_.k[cache_.first_row :], cache_.v[cache_.first_row :], out, starts)
    )
    library().attend_all(Block(*sizes, *pointers), torch.get_num_threads())
    return out


def matrix(weight: torch.Tensor) -> Matrix:
    """A weight [n, k] where it is, row by row."""
    return Matrix(KINDS[weight.dtype], *weight.shape, weight.data_ptr(), None, None)


def multiply(at: Matrix, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [.., k] -> [.., n] for few rows, in x's dtype. dtype: of the model, to which several rows may be rounded."""
    rows = x.reshape(-1, at.k).float().contiguous()
    m = len(rows)
    y = torch.empty(m, at.n)
    sums = torch.empty(m * (at.k // GROUP + 1))
    halves = torch.empty_like(rows, dtype=dtype)
    pointers = rows.data_ptr(), sums.data_ptr(), _if_halves(halves), y.data_ptr()
    library().multiply(at, *pointers, m, torch.get_num_threads())
    return y.view(*x.shape[:-1], at.n).to(x.dtype)


class NativeQuantized(nn.Module):
    """A quantized weight in the order of native.c, which multiplies few rows by it: x [.., k] -> [.., n]."""

    def __init__(self, layer: Quantized):
        super().__init__()
        self.dtype, self.bits, self.n, self.k = layer.dtype, layer.bits, layer.n, layer.k
        if isinstance(layer, Int4):
            kind, data = 3, _panels(_columns_of_8(layer.data), 4)
            scales = [_panels(layer.scale, 1), _panels(layer.zero, 1)]
        else:
            kind, data, scales = 2, _panels(layer.data, 2), [_panels(layer.scale[:, None], 1)]
        for name, buffer in zip(("data", "scale", "zero"), (data, *scales), strict=False):
            self.register_buffer(name, buffer)
        pointers = [buffer.data_ptr() for buffer in (data, *scales)]
        self.at = Matrix(kind, layer.n, layer.k, *pointers)

    def extra_repr(self) -> str:
        return f"{self.n} x {self.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() // self.k > FEW_ROWS:
            return linear(x, self.dequantize(x.dtype))
        return multiply(self.at, x, self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in full, [n, k]."""
        dtype = dtype or self.dtype
        out = torch.empty(self.at.n, self.at.k, dtype=dtype)
        library().dequantize(self.at, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
        return out


def _panels(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[n, k] -> [n / panel, k / width, panel, width], with rows of zeros where the rows of a panel do not divide n."""
    n, k = rows.shape
    panel = library().panel_rows()
    filled = F.pad(rows, (0, 0, 0, -n % panel)) if n % panel else rows
    return filled.view(-1, panel, k // width, width).transpose(1, 2).contiguous()


def _columns_of_8(data: torch.Tensor) -> torch.Tensor:
    """`Int4.data` [n, k / 2] with eight neighbouring columns in four bytes: 0 2, 4 6, 1 3, 5 7, low bits first."""
    groups = data.view(len(data), -1, 1, GROUP // 2)
    q = torch.cat((groups & 15, groups >> 4), dim=2).view(len(data), -1, 2, 2, 2)  # [n, k / 8, .., ..,  even or odd]
    return (q[..., 0, :] | q[..., 1, :] << 4).transpose(-1, -2).flatten(1)


class NativeDecoder:
    """A decode step through all layers by native.c: ids [bsz, 1] -> hidden states [bsz, 1, dim], fp32.

    layers: fused ones (`executor.FusedLayer`) of one shape. Everything is read where the model has it.
    """

    def __init__(self, model: Any, layers: Sequence[Any]):
        first = layers[0]
        heads, kv_heads, head_dim = first.n_local_heads, first.n_local_kv_heads, first.head_dim
        dim, width = len(model.norm.weight), _matrix_of(first.w2).k
        max_rows, _, max_seq_len, _ = first.cache.k.shape
        widest = max(dim, heads * head_dim, width)
        widths = {
            "h": dim,
            "qkv": (heads + 2 * kv_heads) * head_dim,
            "scores": heads * max_seq_len,
            "attended": heads * head_dim,
            "gates": 2 * width,
            "products": width,
            "sums": widest // GROUP + 1,
            "out": dim,
        }
        self.model = model
        self.buffers = {name: torch.zeros(max_rows, size) for name, size in widths.items()}
        self.halves = torch.zeros(max_rows, widest, dtype=first.cache.k.dtype)
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
            halves=_if_halves(self.halves),
            reduce=REDUCE(self._reduce) if model_parallel()[1] > 1 else REDUCE(),
        )

    def __call__(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        self.rows = len(tokens)
        x = self.model.tok_embeddings(tokens).float().contiguous()  # [bsz, 1, dim]
        positions = torch.as_tensor(start_pos).expand(self.rows).contiguous()
        angles = self.model.freqs_cis.to(torch.complex64).contiguous()
        # What native.c reads without knowing its size, and the user can replace at any time.
        newest, capacity, pairs = int(positions.max()), self.struct.max_seq_len, self.struct.head_dim // 2
        if newest >= capacity:
            raise ValueError(f"position {newest}, but the cache has {capacity}: raise max_seq_len")
        if x.shape[-1] != self.struct.dim:
            raise ValueError(f"embeddings of {x.shape[-1]} numbers, but the layers take {self.struct.dim}")
        if angles.dim() != 2 or len(angles) <= newest or angles.shape[1] != pairs:
            raise ValueError(f"freqs_cis has shape {tuple(angles.shape)}, expected [over {newest}, {pairs}]")
        self.struct.freqs_cis = angles.data_ptr()
        threads = torch.get_num_threads()
        if library().decode(self.struct, x.data_ptr(), positions.data_ptr(), self.rows, threads) and self.failure:
            raise self.failure
        return x

    def _reduce(self) -> int:
        # Called from C, through which no exception can pass.
        try:
            dist.all_reduce(self.buffers["out"][: self.rows], group=get_model_parallel_group())
        except BaseException as error:
            self.failure = error
            return 1
        return 0

    def _layer(self, layer: Any) -> Layer:
        return Layer(
            *map(_matrix_of, (layer.wqkv, layer.wo, layer.w13, layer.w2)),
            *(norm.weight.data_ptr() for norm in (layer.attention_norm, layer.ffn_norm)),
            *(layer.cache.k.data_ptr(), layer.cache.v.data_ptr()),
        )


def _matrix_of(product: Any) -> Matrix:
    return product.at if isinstance(product, NativeQuantized) else matrix(product.weight)
