"""native.c from Python: compiled by the machine's C compiler, its structs filled from a model's tensors.

Compiling takes a few seconds and is done once: the library is kept in the user's cache, under a name made from the
source, the compiler and the processor.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import nn

from llama.cache import KVCache
from llama.model import Positions, RMSNorm, Transformer
from llama.quantize import FEW_ROWS, GROUP, Int4, Quantized

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
        *((name, ctypes.c_void_p) for name in ("norm", "cos", "sin", *BUFFERS, "halves")),
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


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-runner"


def compile_library() -> bool:
    """Compile native.c unless that was done before; True if it was not. Raises NoCompilerError."""
    path, compiler = _place()
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
    key = hashlib.sha256("\0".join([SOURCE.read_text(), compiler, version, _processor()]).encode()).hexdigest()[:16]
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


def _processor() -> str:
    """What -march=native stands for: a home folder may be shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


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
def memory_given_back() -> Iterator[None]:
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


def attend(q: torch.Tensor, cache_: KVCache, at: Positions) -> torch.Tensor:
    """Causal attention over a cache that has the queries' own positions already, in bfloat16: [bsz, seqlen, heads,
    head_dim] -> as q."""
    bsz, seqlen, heads, head_dim = q.shape
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = torch.as_tensor(at.start_pos).expand(bsz).contiguous()
    kv_heads, max_seq_len = cache_.k.shape[1:3]
    sizes = bsz, seqlen, heads, kv_heads, head_dim, max_seq_len
    pointers = (tensor.data_ptr() for tensor in (q, cache_.k[at.first_row :], cache_.v[at.first_row :], out, starts))
    library().attend_all(Block(*sizes, *pointers), torch.get_num_threads())
    return out


class Plain(nn.Module):
    """A linear layer on this rank's part of a weight [n, k]: x [.., k] -> [.., n]."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    def extra_repr(self) -> str:
        return " x ".join(map(str, self.weight.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Linear(nn.Module):
    """A linear layer, quantized or not, computed by native.c for few rows: x [.., k] -> [.., n].

    Takes over what the layer holds; numbers of 8 and 4 bits in the order of native.c.
    """

    def __init__(self, layer: Plain | Quantized):
        super().__init__()
        self.plain = layer if isinstance(layer, Plain) else None
        if isinstance(layer, Plain):
            self.dtype = layer.weight.dtype
            self.at = Matrix(KINDS[self.dtype], *layer.weight.shape, layer.weight.data_ptr(), None, None)
            return
        self.dtype = layer.dtype
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
        return "" if self.plain else f"{self.at.n} x {self.at.k}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.at.k)
        m = len(rows)
        if m > FEW_ROWS:
            return F.linear(x, self.plain.weight if self.plain else self.widened(x.dtype))
        rows = rows.float().contiguous()
        y = torch.empty(m, self.at.n)
        sums = torch.empty(m * (self.at.k // GROUP + 1))
        halves = torch.empty_like(rows, dtype=self.dtype)
        pointers = rows.data_ptr(), sums.data_ptr(), _if_halves(halves), y.data_ptr()
        library().multiply(self.at, *pointers, m, torch.get_num_threads())
        return y.view(*x.shape[:-1], self.at.n).to(x.dtype)

    def widened(self, dtype: torch.dtype) -> torch.Tensor:
        """A quantized weight in full, [n, k]."""
        out = torch.empty(self.at.n, self.at.k, dtype=dtype)
        library().dequantize(self.at, out.data_ptr(), KINDS[dtype], torch.get_num_threads())
        return out


def _panels(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[n, k] -> [n / panel, k / width, panel, width], with rows of zeros where the rows of a panel do not divide n."""
    n, k = rows.shape
    panel = library().panel_rows()
    filled = F.pad(rows, (0, 0, 0, -n % panel))
    return filled.view(-1, panel, k // width, width).transpose(1, 2).contiguous()


def _columns_of_8(data: torch.Tensor) -> torch.Tensor:
    """`Int4.data` [n, k / 2] with eight neighbouring columns in four bytes: 0 2, 4 6, 1 3, 5 7, low bits first."""
    groups = data.view(len(data), -1, 1, GROUP // 2)
    q = torch.cat((groups & 15, groups >> 4), dim=2).view(len(data), -1, 2, 2, 2)  # [n, k / 8, .., ..,  even or odd]
    return (q[..., 0, :] | q[..., 1, :] << 4).transpose(-1, -2).flatten(1)


class Step:
    """`Transformer.step` by native.c: ids [bsz, 1] -> fp32 hidden states [bsz, 1, dim]."""

    def __init__(self, model: Transformer):
        args, blocks = model.params, list[Any](model.layers)
        attention, width = blocks[0].attention, blocks[0].feed_forward.w2.at.k
        heads, kv_heads, head_dim = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        widest = max(args.dim, heads * head_dim, width)
        widths = {
            "h": args.dim,
            "qkv": (heads + 2 * kv_heads) * head_dim,
            "scores": heads * args.max_seq_len,
            "attended": heads * head_dim,
            "gates": 2 * width,
            "products": width,
            "sums": widest // GROUP + 1,
            "out": args.dim,
        }
        rows = args.max_batch_size
        self.embed = model.tok_embeddings  # not the model, which owns this step and the memory that `struct` points at
        self.buffers = {name: torch.zeros(rows, size) for name, size in widths.items()}
        self.halves = torch.zeros(rows, widest, dtype=attention.cache.k.dtype)
        self.failure: BaseException | None = None
        self.rows = 0
        self.norms: list[torch.Tensor] = []
        self.layers = (Layer * args.n_layers)(*map(self._layer, blocks))
        pointers = {name: buffer.data_ptr() for name, buffer in self.buffers.items()}
        self.struct = Model(
            *(args.n_layers, args.dim, heads, kv_heads, head_dim, width, args.max_seq_len),
            KINDS[attention.cache.k.dtype],
            args.norm_eps,
            self.layers,
            self._norm(model.norm),
            model.cos.data_ptr(),
            model.sin.data_ptr(),
            **pointers,
            halves=_if_halves(self.halves),
            reduce=REDUCE(self._reduce) if dist.get_world_size() > 1 else REDUCE(),
        )

    def __call__(self, tokens: torch.Tensor, start_pos: int | torch.Tensor) -> torch.Tensor:
        self.rows = len(tokens)
        x = self.embed(tokens).float().contiguous()  # [bsz, 1, dim]
        positions = torch.as_tensor(start_pos).expand(self.rows).contiguous()
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

    def _layer(self, block: Any) -> Layer:
        attention, feed_forward, cache_ = block.attention, block.feed_forward, block.attention.cache
        return Layer(
            *(w.at for w in (attention.wqkv, attention.wo, feed_forward.w13, feed_forward.w2)),
            *(self._norm(norm) for norm in (block.attention_norm, block.ffn_norm)),
            *(cache_.k.data_ptr(), cache_.v.data_ptr()),
        )

    def _norm(self, norm: RMSNorm) -> int:
        self.norms.append(norm.weight.float())
        return self.norms[-1].data_ptr()
