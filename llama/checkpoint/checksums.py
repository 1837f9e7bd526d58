"""Check the bytes of a checkpoint's files against checklists and against the CRCs inside the shards."""

import hashlib
import re
import zlib
from pathlib import Path
from typing import Any

from llama.checkpoint.errors import CheckpointError, some_names
from llama.checkpoint.paths import shard_number
from llama.checkpoint.report import Report
from llama.checkpoint.shards import suggest_fix
from llama.checkpoint.zip_integrity import BLOCK, Record, damaged_records, read_zip
from llama.console import progress
from llama.files import JSON, OLD_TORCH, PICKLE, SAFETENSORS, ZIP, detect_format, expect_file, read_small_file

MAX_NAME_BYTES = 255  # the limit for a file name in nearly every file system
HASHES = {32: "md5", 64: "sha256"}  # number of hexadecimal digits -> algorithm
Listed = dict[Path, tuple[str, Path]]  # file -> (its hash, the checklist that lists it)


def read_checklists(folder: Path, report: Report) -> Listed:
    """Read checklist.chk and tokenizer_checklist.chk, each from the folder or, if it is not there, from its parent."""
    listed: Listed = {}
    for checklist in ("checklist.chk", "tokenizer_checklist.chk"):
        paths = [place / checklist for place in (folder, folder.resolve().parent) if (place / checklist).exists()]
        if not paths:
            continue
        path = paths[0]
        try:
            kind, text = detect_format(path), read_small_file(path).decode("utf-8-sig", errors="replace")
        except OSError as error:
            report.add_problem(path, f"cannot be read ({error.strerror or error}): fetch it again")
            continue
        if kind:
            report.add_problem(path, f"is {kind}, expected lines of a hash and a file name: fetch it again")
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = re.fullmatch(r"([0-9a-fA-F]{32}|[0-9a-fA-F]{64})[ \t]+\*?(\S.*?)\s*", line)
            name = match[2].removeprefix("./") if match else ""
            if not match:
                problem = f"is {line[:60]!r}, expected an md5 or sha256 hash and a file name: fetch it again"
                report.add_problem(path, f"cannot be read: line {number} {problem}")
            elif name in (".", "..") or re.search(r"[/\\\0]", name) or len(name.encode()) > MAX_NAME_BYTES:
                problem = f"names {name[:60]!r} in line {number}, expected the name of a file, without a path"
                report.add_problem(path, f"{problem}: remove the line")
            else:
                file = folder / name if (folder / name).exists() else path.parent / name
                listed[file] = match[1].lower(), path
    return listed


def check_files(
    files: list[Path], listed: Listed, folder: Path, report: Report, part: int = 0, parts: int = 1
) -> set[Path]:
    """Read `files` and all listed files completely, once, and return the intact ones.

    A file whose hash differs from the listed one is a problem. It still counts as intact if no CRC shows damage.

    part, parts: check only the CRCs of records part, part + parts, part + 2 * parts, ... of each shard, so that
    processes can share the work.
    """
    file_of_hash = {digest: path for path, (digest, _) in listed.items()}
    intact = set()
    shards: dict[tuple[Any, ...], Path] = {}  # names, sizes and CRCs of the tensors -> shard
    unnumbered = False  # whether a shard does not record its number
    for path in dict.fromkeys([*files, *listed]):
        expected, checklist = listed.get(path, ("", path))
        actual, records = "", list[Record]()
        try:
            problem, actual, records = _read_through(path, expected, path in files, part, parts)
        except FileNotFoundError:
            problem = f"is missing{f', but {checklist.name} lists it' if expected else ''}: fetch it"
        except (CheckpointError, OSError) as error:
            reason = error.strerror or error if isinstance(error, OSError) else error
            problem = f"cannot be read ({reason}): fetch it again"
        if problem:
            report.add_problem(path, problem)
            continue
        intact.add(path)
        if actual != expected:
            problem, fix = f"does not match {checklist.name}", "fetch it again"
            if actual in file_of_hash:
                problem = f"holds what {checklist.name} lists as {file_of_hash[actual].name}"
                fix = "rename the files to match"
            kind = HASHES[len(expected)]
            report.add_problem(path, f"{problem}: its {kind} is {actual}, expected {expected}: {fix}")
        elif shard_number(path) is not None:
            unnumbered |= _check_identity(path, records, bool(expected), shards, report)
    if listed:
        report.checked.append(f"{len(listed)} files against their listed hashes")
        report.notes += [f"{path} is in no checklist" for path in files if path not in listed and path in intact]
    else:
        report.notes.append(
            f"no checklist.chk in {folder} or its parent: shards are checked by their CRCs, other files not at all"
        )
    if unnumbered and len(shards) > 1:
        report.notes.append("the shards do not record their numbers: two that were swapped would go unnoticed")
    return intact


def _read_through(
    path: Path, expected: str, check_format: bool, part: int, parts: int
) -> tuple[str, str, list[Record]]:
    """Return (problem or "", hash or "" if none is listed, records if the file is a zip archive).

    expected: the listed hash, or "". Raises OSError or CheckpointError if the file cannot be read.
    """
    is_shard = shard_number(path) is not None
    expect_file(path)
    if path.is_dir():
        return "is a folder, expected a file: remove it and fetch the file", "", []
    if check_format and (problem := _wrong_format(path, is_shard)):
        return problem, "", []
    records = read_zip(path) if is_shard and detect_format(path) == ZIP else []
    actual = _hash(path, HASHES[len(expected)]) if expected else ""
    damaged = damaged_records(path, records[part::parts]) if not expected or actual != expected else []
    return f"is damaged in {some_names(damaged)}: fetch it again" if damaged else "", actual, records


def _wrong_format(path: Path, is_shard: bool) -> str | None:
    kind = detect_format(path)
    if not is_shard:
        is_expected = kind in (None, ZIP, PICKLE) or (kind == JSON and path.suffix != ".pth")
    else:
        is_expected = kind in ((SAFETENSORS,) if path.suffix == ".safetensors" else (ZIP, OLD_TORCH))
    if is_expected:
        return None
    expected = "the file itself"
    if is_shard:
        expected = "a safetensors file" if path.suffix == ".safetensors" else "a file of torch.save"
    return f"is {kind or 'of unknown format'}, expected {expected}: {suggest_fix(kind)}"


def _check_identity(
    path: Path, records: list[Record], is_listed: bool, shards: dict[tuple[Any, ...], Path], report: Report
) -> bool:
    """Report a shard that repeats another's tensors (by CRC) or was saved under another number.

    Adds the shard to `shards` and `report.digests`.

    Returns True if the archive does not record its shard number and no checklist lists it.
    """
    if not records:
        with path.open("rb") as file:
            report.digests[path.name] = f"{path.stat().st_size} bytes, {zlib.crc32(file.read(BLOCK)):08x}"
        if not is_listed:
            report.notes.append(f"{path} holds no checksums: only a checklist can show that it is undamaged")
        return False
    data = tuple((r.name.partition("/")[2], r.stop - r.start, r.crc) for r in records if "/data/" in r.name)
    report.digests[path.name] = f"{zlib.crc32(repr(data).encode()):08x}"
    # torch.save names the archive's top folder after the file.
    saved_as = re.fullmatch(r"consolidated\.(\d{1,4})", records[0].name.partition("/")[0], re.ASCII)
    if not any(record.crc for record in records):
        report.notes.append(f"{path} was written without CRCs: only a checklist can show that it is undamaged")
    elif data in shards:
        report.add_problem(path, f"holds the same tensors as {shards[data].name}: remove it, or fetch this shard again")
    elif not is_listed and saved_as and int(saved_as[1]) != shard_number(path):
        report.add_problem(path, f"was saved as {saved_as[0]}.pth, expected {path.name}: rename the files to match")
    shards.setdefault(data, path)
    return not is_listed and not saved_as


def _hash(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        for _ in progress(range(-(-path.stat().st_size // BLOCK)), f"{path.name}: MiB"):
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
