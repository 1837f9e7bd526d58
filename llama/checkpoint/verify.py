"""Checking a Meta folder without loading it: the function behind `python -m llama verify`."""

import hashlib
import io
import logging
import re
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llama.chat.formats import find_chat_format
from llama.checkpoint.folder import (
    EMBEDDING,
    OUTPUT,
    SHARD_AXIS,
    Checkpoint,
    Shapes,
    shard_faults,
    tensor_shapes,
    without_layer,
)
from llama.checkpoint.shards import Tensors, names_note, open_shard, way_out
from llama.console import in_one_line
from llama.files import (
    JSON,
    OLD_TORCH,
    PICKLE,
    SAFETENSORS,
    ZIP,
    as_path,
    describe_path,
    detect_format,
    expect_file,
    number_shards,
    other_shards,
    read_small,
    shard_number,
)
from llama.params import CheckpointError, ModelArgs, load_params
from llama.progress import progress
from llama.tokenizer import Tokenizer, TokenizerError, find_tokenizer

log = logging.getLogger(__name__)

LONGEST_NAME = 255  # bytes of a file's name, in nearly every file system
BLOCK = 2**20  # files are read in blocks of so many bytes
HASHES = {32: "md5", 64: "sha256"}  # by the digits of a sum
# Norms stand in every file. One model's may differ by their last bit, 0.8 % in bfloat16; another model's by far more.
SAME_NORMS = 0.01
Listed = dict[Path, tuple[str, Path]]  # file -> (its sum, the checklist that says so)


def verify(ckpt_dir: str) -> None:
    """Check a folder of consolidated.NN.pth shards against its checklists, itself and params.json, without loading it.

    Prints a line for each fault on stdout and ends with exit status 1 if there is any, else a line that says what was
    checked. Lines that begin with "note:" are no faults.
    """
    folder = as_path(ckpt_dir)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} {describe_path(folder)}")
    found = check(folder)
    for line in [*found.faults, *(f"note: {note}" for note in found.notes)]:
        print(in_one_line(line))
    if found.faults:
        sys.exit(1)
    print(f"OK: {in_one_line(folder)}: {', '.join(found.checked)}")


@dataclass
class Findings:
    """What a check found: faults, and notes that are no faults, a line each; what was compared, a phrase each.

    faulty: the files that faults are about, so that no file is told twice to be missing.
    sums: shard -> a sum of the sums of its tensors.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    faulty: set[Path] = field(default_factory=set)
    sums: dict[str, str] = field(default_factory=dict)

    def add(self, path: Path, fault: object) -> None:
        self.faults.append(f"{path} {fault}")
        self.faulty.add(path)


@dataclass
class Record:
    """One file inside a zip file: its bytes [start, stop), the CRC they should have, and what is wrong without them."""

    name: str
    start: int
    stop: int
    crc: int
    fault: str = ""


def check(folder: Path) -> Findings:
    """All that can be said of a folder without loading its weights."""
    found = Findings()
    shards = _number_shards(folder, found)
    if not shards:  # the rest would only say what else of a Meta folder is not there
        found.faults.append(f"{folder} {describe_path(folder)}")
        return found
    found.notes += names_note(shards)
    params = folder / "params.json"
    try:
        tokenizer = find_tokenizer(folder)
    except TokenizerError as error:
        found.faults.append(str(error).replace("give --tokenizer_path", "put it there"))
        tokenizer = None
    files = [*shards.values(), params, *([tokenizer] if tokenizer else [])]
    readable = check_bytes(files, read_checklists(folder, found), folder, found)

    args, opened = None, {}
    if params in readable:
        try:
            keys, notes = load_params(folder)
            args = ModelArgs(**keys)
            found.notes += notes
        except CheckpointError as error:
            found.faults.append(str(error))
    for number, path in shards.items():
        if path in readable:
            try:
                shard = open_shard(path)
            except CheckpointError as error:
                found.faults.append(str(error))
                continue
            opened[number] = shard.tensors
            found.notes += [note for note in shard.notes if note not in found.notes]
    args = _check_tensors(shards, opened, args, found)
    if tokenizer in readable:
        _check_tokenizer(tokenizer, args, found)
    return found


def _number_shards(folder: Path, found: Findings) -> dict[int, Path]:
    shards, twice = number_shards(folder)
    for path in twice:
        first = shards[shard_number(path) or 0].name
        found.add(path, f"has the same number as {first}: remove the one that is too many")
    others = [path.name for path in other_shards(folder)]
    if shards and others:
        found.notes.append(f"{folder}: {_some(others)} not looked at: numbers of shards have up to four digits")
    return shards


def check_before_loading(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> tuple[list[str], dict[str, str]]:
    """(faults of the shards, a line each; file -> a sum of the sums inside it).

    Each of `parts` processes reads its part of the bytes, all of them look at everything else. No checklist is read.
    """
    found, folder = Findings(), checkpoint.paths[0].parent
    shards = _number_shards(folder, found)
    readable = check_bytes(list(shards.values()), {}, folder, found, part, parts)
    opened = {}
    for number, path in shards.items():
        if checkpoint.is_read_whole(number):
            opened[number] = checkpoint[number]
        elif path in readable:
            # Mapped for this alone: the pages that are looked at here are not those of the slices that the rank loads.
            shard = open_shard(path)
            opened[number] = shard.tensors
            for note in checkpoint.add_notes(shard.notes):
                log.info(f"note: {note}")
    _check_tensors(shards, opened, checkpoint.params, found, part, parts)
    return found.faults, found.sums


# Bytes --------------------------------------------------------------------------------------------


def check_bytes(
    files: list[Path], listed: Listed, folder: Path, found: Findings, part: int = 0, parts: int = 1
) -> set[Path]:
    """Read every file once, those that checklists name too, or this part of the shards' data. Returns the files that
    are what they should be, even where their sum says that they are another model's."""
    named = {digest: path for path, (digest, _) in listed.items()}
    readable = set()
    seen: dict[tuple[Any, ...], Path] = {}  # shards by their data
    unordered = False  # shards of which nothing says which part they are
    for path in dict.fromkeys([*files, *listed]):
        digest, checklist = listed.get(path, ("", path))
        is_shard = shard_number(path) is not None
        sum_ = torn = ""
        try:
            expect_file(path)
            if path.is_dir():
                found.add(path, "is a folder, expected a file: remove it and fetch the file")
                continue
            if path in files and (fault := _wrong_kind(path, is_shard)):
                found.add(path, fault)
                continue
            records = read_zip(path) if is_shard and detect_format(path) == ZIP else []
            if digest:
                sum_ = _hash(path, HASHES[len(digest)])
            if not digest or sum_ != digest:
                torn = _some(damaged_records(path, records[part::parts]))
        except FileNotFoundError:
            found.add(path, f"is missing{f', but {checklist.name} lists it' if digest else ''}: fetch it")
            continue
        except (CheckpointError, OSError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            found.add(path, f"cannot be read ({reason}): fetch it again")
            continue
        if torn:
            found.add(path, f"is damaged in {torn}: fetch it again")
            continue
        readable.add(path)
        if sum_ != digest:
            what = (
                f"holds what {checklist.name} calls {named[sum_].name}" if sum_ in named else "is not the listed file"
            )
            way = "put each file in its place" if sum_ in named else "fetch it again"
            kind = HASHES[len(digest)]
            found.add(path, f"{what}: its {kind} is {sum_}, expected {digest}: {way}")
        elif is_shard and not records:
            found.sums[path.name] = f"{path.stat().st_size} bytes, {_start_sum(path)}"
            if not digest:
                found.notes.append(
                    f"{path} holds no sums of its data: only a checklist could tell that it is undamaged"
                )
        elif is_shard:
            data = tuple((r.name.partition("/")[2], r.stop - r.start, r.crc) for r in records if "/data/" in r.name)
            found.sums[path.name] = f"{zlib.crc32(repr(data).encode()):08x}"
            inner = re.fullmatch(r"consolidated\.(\d{1,4})", records[0].name.partition("/")[0], re.ASCII)
            if not any(r.crc for r in records):
                found.notes.append(f"{path} was written without CRCs: only a checklist could tell that it is undamaged")
            elif data in seen:
                found.add(path, f"holds the same tensors as {seen[data].name}: remove it, or fetch this part again")
            elif not digest and inner and int(inner[1]) != shard_number(path):
                found.add(path, f"was saved as {inner[0]}.pth, expected {path.name}: put each file in its place")
            seen.setdefault(data, path)
            unordered |= not digest and not inner
    if listed:
        found.checked.append(f"{len(listed)} files against their listed sums")
        found.notes += [f"{path} is in no checklist" for path in files if path not in listed and path in readable]
    else:
        found.notes.append(
            f"no checklist.chk in {folder} or beside it: shards are checked by their CRCs, the other files by nothing"
        )
    if unordered and len(seen) > 1:
        found.notes.append("nothing in the shards says which part each one is: two in each other's place look right")
    return readable


def _wrong_kind(path: Path, is_shard: bool) -> str | None:
    kind = detect_format(path)
    if not is_shard:
        right = kind in (None, ZIP, PICKLE) or (kind == JSON and path.suffix != ".pth")
    else:
        right = kind in ((SAFETENSORS,) if path.suffix == ".safetensors" else (ZIP, OLD_TORCH))
    if right:
        return None
    expected = "the file itself"
    if is_shard:
        expected = "a safetensors file" if path.suffix == ".safetensors" else "a file of torch.save"
    return f"is {kind or 'of no known kind'}, expected {expected}: {way_out(kind)}"


def read_checklists(folder: Path, found: Findings) -> Listed:
    """From checklist.chk and tokenizer_checklist.chk in the folder or else beside it."""
    listed: Listed = {}
    for checklist in ("checklist.chk", "tokenizer_checklist.chk"):
        places = [place / checklist for place in (folder, folder.resolve().parent) if (place / checklist).exists()]
        if not places:
            continue
        path = places[0]
        try:
            kind, text = detect_format(path), read_small(path).decode("utf-8-sig", errors="replace")
        except OSError as error:
            found.add(path, f"cannot be read ({error.strerror or error}): fetch it again")
            continue
        if kind:
            found.add(path, f"is {kind}, expected lines of a sum and a name: fetch it again")
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64})[ \t]+\*?(\S.*?)\s*", line)
            name = match[2].removeprefix("./") if match else ""
            if not match:
                what = f"is {line[:60]!r}, expected an md5 or sha256 sum and a name: fetch it again"
                found.add(path, f"cannot be read: line {number} {what}")
            elif name in (".", "..") or re.search(r"[/\\\0]", name) or len(name.encode()) > LONGEST_NAME:
                what = f"names {name[:60]!r} in line {number}, expected the name of a file, without a path"
                found.add(path, f"{what}: remove the line")
            else:
                file = folder / name if (folder / name).exists() else path.parent / name
                listed[file] = match[1].lower(), path
    return listed


def read_zip(path: Path) -> list[Record]:
    """The records of a zip file by their place. Raises CheckpointError where its directory is damaged."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            as_written = _ends_as_written(file) and not min((i.header_offset for i in archive.infolist()), default=0)
            file.seek(archive.start_dir)
            directory, at, records = file.read(), 0, []
            for info in archive.infolist():
                name_length, extra_length, comment_length = struct.unpack_from("<3H", directory, at + 28)
                records.append(_read_record(file, info, directory[at : at + 46 + name_length]))
                at += 46 + name_length + extra_length + comment_length
    except OSError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds; all mean that the file is damaged
        raise CheckpointError(f"cut short at {path.stat().st_size:,} bytes, or damaged: {error}") from error
    if not records:
        raise CheckpointError("a zip file of nothing")
    if not as_written:
        raise CheckpointError("damaged: two files joined, or something stands before, within or behind it")
    records.sort(key=lambda record: record.start)
    for record, limit in zip(records, [*(record.start for record in records[1:]), path.stat().st_size], strict=True):
        if record.stop > limit:
            record.fault = "length"
    return records


def _ends_as_written(file: BinaryIO) -> bool:
    """Is the directory where the end of the file says, and nothing behind it?

    zipfile looks for it right before the end, torch where the end says. Where bytes were added these are two places,
    and the sums of one file would be compared while the weights of another are loaded.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(-min(size, 98), io.SEEK_END)
    tail = file.read().rjust(98, b"\0")  # the end for large files, 56 bytes, the place of that one, 20, and the end, 22
    if tail[56:60] == b"PK\x06\x07":
        length, offset = struct.unpack_from("<2Q", tail, 40)
        stop = size - 98
        whole = tail[:4] == b"PK\x06\x06" and struct.unpack_from("<Q", tail, 64)[0] == stop
    else:
        length, offset = struct.unpack_from("<2L", tail, 88)
        stop, whole = size - 22, True
    return whole and tail[76:80] == b"PK\x05\x06" and tail[96:] == bytes(2) and offset + length == stop


def _read_record(file: BinaryIO, info: zipfile.ZipInfo, central: bytes) -> Record:
    """A record, with what its own header and the directory's entry (`central`) say differently.

    zipfile and torch believe one or the other, so a flipped bit there can hide.
    """
    file.seek(info.header_offset)
    local = file.read(30)
    if len(local) < 30:
        raise CheckpointError(f"{info.filename} lies beyond its end")
    name_length, extra_length = struct.unpack_from("<2H", local, 26)
    name, extra = file.read(name_length), file.read(extra_length)
    start = info.header_offset + 30 + name_length + extra_length
    record = Record(info.filename, start, start + info.file_size, info.CRC)
    # From the version to the date both have the same fields; the sum may come behind the data instead.
    streamed = info.flag_bits & 8
    same = local[:4] == b"PK\x03\x04" and local[4:14] == central[6:16] and name == central[46:]
    if not same or local[14:18] != (bytes(4) if streamed else central[16:20]):
        record.fault = "header"
    while len(extra) >= 4:  # fields of a kind, a length and so many bytes; torch's padding is Z's in a field "FB"
        kind, length = struct.unpack_from("<2sH", extra)
        if kind == b"FB" and extra[4 : 4 + length].strip(b"Z"):
            record.fault = "padding"
        extra = extra[4 + length :]
    if streamed:
        file.seek(record.stop)
        behind = file.read(24)
        sizes = [struct.pack("<2Q", info.compress_size, info.file_size)]
        if max(info.compress_size, info.file_size) < 2**32:
            sizes.append(struct.pack("<2L", info.compress_size, info.file_size))
        if not behind.startswith(tuple(b"PK\x07\x08" + central[16:20] + size for size in sizes)):
            record.fault = "sum"
    if info.compress_type != zipfile.ZIP_STORED:
        record.fault = "compression, which torch.save does not use"
    return record


def _hash(path: Path, kind: str) -> str:
    hashed = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        for _ in progress(range(-(-path.stat().st_size // BLOCK)), f"{path.name}: MiB"):
            hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


def damaged_records(path: Path, records: list[Record]) -> list[str]:
    """The records of a zip file that are not what their CRCs say, or wrong without them."""
    whole = [record for record in records if not record.fault]
    if not any(record.crc for record in whole):
        whole = []  # written with torch.serialization.set_crc32_options(False)
    torn = {record.name: record.fault for record in records if record.fault}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = pool.map(lambda record: _crc(path, record), whole)
        for record, crc in zip(progress(whole, f"checking {path.name}"), found, strict=True):
            if crc != record.crc:
                torn[record.name] = ""
    return [f"{name} ({fault})" if fault else name for name, fault in torn.items()]


def _start_sum(path: Path) -> str:
    with path.open("rb") as file:
        return f"{zlib.crc32(file.read(BLOCK)):08x}"


def _crc(path: Path, record: Record) -> int:
    crc, left, block = 0, record.stop - record.start, memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        file.seek(record.start)
        while left and (size := file.readinto(block[:left])):
            crc, left = zlib.crc32(block[:size], crc), left - size
    return crc


# Tensors ------------------------------------------------------------------------------------------


def _check_tensors(
    shards: dict[int, Path],
    opened: dict[int, Tensors],
    args: ModelArgs | None,
    found: Findings,
    part: int = 0,
    parts: int = 1,
) -> ModelArgs | None:
    """Account for every tensor of every file, and look at the numbers of this part of them. Returns `args` with its
    vocabulary, None where that is unknown."""
    if not args or not opened:  # then only the numbers of the files say something
        _check_count(shards, max(shards) + 1, found)
        return args
    tables = {number: tensors[EMBEDDING] for number, tensors in opened.items() if EMBEDDING in tensors}
    columns = [table.shape[1] for table in tables.values() if table.dim() == 2]
    if not columns:
        found.add(next(iter(shards.values())), f"has no {EMBEDDING}, expected a Llama checkpoint in Meta's layout")
        return None
    axis = 0 if _commonest(columns) == args.dim else 1
    rows = _commonest(table.shape[0] for table in tables.values() if table.dim() == 2)
    tied = not any(OUTPUT in tensors for tensors in opened.values())
    # The number of files, unless every file is a part of a model in another number.
    counts = [len(shards), max(shards) + 1, *filter(None, (_parts(tensors, args) for tensors in opened.values()))]
    models = {}
    for count in dict.fromkeys(counts):
        vocab_size = args.vocab_size if args.vocab_size != -1 else rows * count if axis == 0 else rows
        model = replace(args, vocab_size=vocab_size)
        shapes = {key: shape for key, shape in tensor_shapes(model).items() if not (tied and key == OUTPUT)}
        faults = {number: shard_faults(tensors, shapes, axis, count) for number, tensors in opened.items()}
        models[count] = model, shapes, faults
    count = min(models, key=lambda n: all(models[n][2].values()))  # the first one that any file fits
    args, shapes, faults = models[count]
    _check_count(shards, count, found)
    what = "the whole" if count == 1 else f"one of {count} parts"
    for number in opened:
        if number < count:
            for fault in faults[number]:
                found.add(
                    shards[number],
                    f"is not {what} of the model in params.json, {fault}: put a file of that model there, or the "
                    "params.json that this one belongs to",
                )
    for number, tensors in opened.items():
        if shards[number] not in found.faulty:
            names, label = list(tensors)[part::parts], f"looking for NaN in {shards[number].name}"
            if bad := [name for name in progress(names, label) if not is_finite(tensors[name])]:
                found.add(shards[number], f"holds NaN or infinity in {_some(bad)}: take another checkpoint")
    check_kinship(
        shards, {n: t for n, t in opened.items() if n < count and shards[n] not in found.faulty}, shapes, found
    )
    if tied:
        found.notes.append(f"no file has {OUTPUT}: the embedding serves as the output too")
    found.checked.append(f"{count} shard{'s' * (count > 1)} of {len(shapes)} tensors against params.json")
    return args


def is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    # Axes in the order in which they lie in memory: what is no contiguous piece of it even so, aminmax would copy.
    rows = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    parts = [rows] if rows.is_contiguous() else rows.split(max(1, BLOCK // rows[0].numel()))
    # NaN comes through, and no further tensor is needed.
    return all(bool(limit.isfinite()) for part in parts for limit in part.aminmax())


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _parts(tensors: Tensors, args: ModelArgs) -> int | None:
    """The number of files that a model's first query projection lies in, going by this one."""
    wq = tensors.get("layers.0.attention.wq.weight")
    return args.n_heads * args.head_dim // wq.shape[0] if wq is not None and wq.dim() and wq.shape[0] else None


def _check_count(shards: dict[int, Path], count: int, found: Findings) -> None:
    """Are the files those of a model in `count` parts?"""
    folder = next(iter(shards.values())).parent
    told = shards.keys() | {number for path in found.faulty if (number := shard_number(path)) is not None}
    missing = count - sum(number < count for number in told)
    first = [folder / f"consolidated.{n:02d}.pth" for n in islice((n for n in range(count) if n not in told), 4)]
    if missing > len(first):  # a damaged params.json may ask for a million
        names = ", ".join(path.name for path in first)
        found.add(folder, f"lacks {names} and {missing - 4:,} more of the model's {count:,} parts: fetch them")
        first = []
    for path in first:
        found.add(path, f"is missing, one of {count} parts of the model: fetch it")
    for number, path in shards.items():
        if number >= count and path not in found.faulty:
            found.add(
                path, f"is one file too many, expected {count} of them: remove it, or fetch those that belong to it"
            )


def check_kinship(shards: dict[int, Path], opened: dict[int, Tensors], shapes: Shapes, found: Findings) -> None:
    """Are files whose shapes fit parts of one model? They have the types and the norms of most of the others."""
    if len(opened) < 2:
        return
    norms = [key for key in shapes if key != EMBEDDING and SHARD_AXIS[without_layer(key)] is None]
    types = {number: [tensors[key].dtype for key in shapes] for number, tensors in opened.items()}
    repeated = {n: torch.cat([tensors[key].flatten().float() for key in norms]) for n, tensors in opened.items()}

    def alike(a: int, b: int) -> bool:
        far = (repeated[a] - repeated[b]).abs().mean() > SAME_NORMS * repeated[a].abs().mean()
        return not far and types[a] == types[b]

    model = max(opened, key=lambda number: sum(alike(number, other) for other in opened))
    for number in opened:
        if not alike(model, number):
            what = "types" if types[model] != types[number] else "norms"
            found.add(
                shards[number],
                f"has other {what} than {shards[model].name}, expected parts of one model: fetch the one that is not "
                "this model's",
            )


def _check_tokenizer(path: Path, args: ModelArgs | None, found: Findings) -> None:
    try:
        tokenizer = Tokenizer(path, use_scaled_rope=bool(args and args.use_scaled_rope))
        find_chat_format(tokenizer)
    except TokenizerError as error:
        found.faults.append(str(error))
        return
    if args and args.vocab_size not in (-1, tokenizer.n_words):
        found.add(path, f"has {tokenizer.n_words} ids, expected the model's {args.vocab_size}: fetch the model's own")
    found.checked.append(f"{path.name} with {tokenizer.n_words} ids")


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
