"""Check the zip archives that torch.save writes: directory, headers, and the CRC-32 of each record.

The format is described in PKWARE's APPNOTE.TXT. zipfile uses the directory, and torch uses some of the local headers.
After a flipped bit or appended bytes, zipfile and torch can read different contents. So this module compares directory
and headers.
"""

import io
import mmap
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from llama.checkpoint.errors import CheckpointError
from llama.console import progress

BLOCK = 2**20  # bytes read at a time


@dataclass
class Record:
    """One file inside an archive: its bytes [start, stop) and their CRC-32.

    problem: what is wrong with it, found without reading the bytes; "" if nothing.
    """

    name: str
    start: int
    stop: int
    crc: int
    problem: str = ""


def read_zip(path: Path) -> list[Record]:
    """The records of an archive, sorted by position. Raises CheckpointError if the directory is damaged."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            first_offset = min((info.header_offset for info in archive.infolist()), default=0)
            is_intact = first_offset == 0 and _ends_with_directory(file)
            file.seek(archive.start_dir)
            directory, position, records = file.read(), 0, []
            for info in archive.infolist():
                name_length, extra_length, comment_length = struct.unpack_from("<3H", directory, position + 28)
                records.append(_read_record(file, info, directory[position : position + 46 + name_length]))
                position += 46 + name_length + extra_length + comment_length
    except OSError:
        raise
    except Exception as error:  # zipfile raises half a dozen types; all mean that the file is damaged
        raise CheckpointError(f"cut short at {path.stat().st_size:,} bytes, or damaged: {error}") from error
    if not records:
        raise CheckpointError("an empty zip file")
    if not is_intact:
        raise CheckpointError("damaged: two files joined, or extra bytes before, inside or after the archive")
    records.sort(key=lambda record: record.start)
    limits = [*(record.start for record in records[1:]), path.stat().st_size]
    for record, limit in zip(records, limits, strict=True):
        if record.stop > limit:
            record.problem = "length"
    return records


def damaged_records(path: Path, records: list[Record]) -> list[str]:
    """The names of records that have a problem or do not match their CRC, with the problem in parentheses."""
    readable = [record for record in records if not record.problem]
    if not any(record.crc for record in readable):
        readable = []  # written with torch.serialization.set_crc32_options(False)
    damaged = {record.name: record.problem for record in records if record.problem}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        crcs = pool.map(lambda record: _crc(path, record), readable)
        for record, crc in zip(progress(readable, f"checking {path.name}"), crcs, strict=True):
            if crc != record.crc:
                damaged[record.name] = ""
    return [f"{name} ({problem})" if problem else name for name, problem in damaged.items()]


def _ends_with_directory(file: BinaryIO) -> bool:
    """Whether the directory is at the offset in the end record, and nothing follows the end record.

    zipfile expects the directory right before the end record, torch at the offset in the end record. If bytes were
    added, these places differ: the checksums of one archive would be checked and the weights of another loaded.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(-min(size, 98), io.SEEK_END)
    tail = file.read().rjust(98, b"\0")  # zip64 end record (56 bytes), zip64 locator (20), end record (22)
    if tail[56:60] == b"PK\x06\x07":
        length, offset = struct.unpack_from("<2Q", tail, 40)
        stop = size - 98
        is_zip64_valid = tail[:4] == b"PK\x06\x06" and struct.unpack_from("<Q", tail, 64)[0] == stop
    else:
        length, offset = struct.unpack_from("<2L", tail, 88)
        stop, is_zip64_valid = size - 22, True
    has_comment = tail[96:] != bytes(2)
    return is_zip64_valid and tail[76:80] == b"PK\x05\x06" and not has_comment and offset + length == stop


def _read_record(file: BinaryIO, info: zipfile.ZipInfo, entry: bytes) -> Record:
    """Read a record. It gets a problem if its local header differs from `entry`, its directory entry."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30:
        raise CheckpointError(f"{info.filename} starts beyond the end of the file")
    name_length, extra_length = struct.unpack_from("<2H", header, 26)
    name, extra = file.read(name_length), file.read(extra_length)
    start = info.header_offset + 30 + name_length + extra_length
    record = Record(info.filename, start, start + info.file_size, info.CRC)
    # Header and entry share the fields from version to date. In a streamed record the header's CRC is 0, and a data
    # descriptor with the CRC follows the data.
    is_streamed = info.flag_bits & 8
    is_same = header[:4] == b"PK\x03\x04" and header[4:14] == entry[6:16] and name == entry[46:]
    if not is_same or header[14:18] != (bytes(4) if is_streamed else entry[16:20]):
        record.problem = "header"
    while len(extra) >= 4:  # each field: kind, length, data; torch pads with Z's in a field "FB"
        kind, length = struct.unpack_from("<2sH", extra)
        if kind == b"FB" and extra[4 : 4 + length].strip(b"Z"):
            record.problem = "padding"
        extra = extra[4 + length :]
    if is_streamed:
        file.seek(record.stop)
        descriptor = file.read(24)
        sizes = [struct.pack("<2Q", info.compress_size, info.file_size)]
        if max(info.compress_size, info.file_size) < 2**32:
            sizes.append(struct.pack("<2L", info.compress_size, info.file_size))
        if not descriptor.startswith(tuple(b"PK\x07\x08" + entry[16:20] + size for size in sizes)):
            record.problem = "data descriptor"
    if info.compress_type != zipfile.ZIP_STORED:
        record.problem = "compression, which torch.save does not use"
    return record


def _crc(path: Path, record: Record) -> int:
    # A mapping is page-aligned. A bytearray may start 16 bytes after a page boundary, and some processors read into
    # that at a fifth of the speed.
    crc, left, block = 0, record.stop - record.start, memoryview(mmap.mmap(-1, BLOCK))
    with path.open("rb", buffering=0) as file:
        file.seek(record.start)
        while left and (size := file.readinto(block[:left])):
            crc, left = zlib.crc32(block[:size], crc), left - size
    return crc
