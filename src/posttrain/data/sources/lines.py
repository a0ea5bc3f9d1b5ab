"""Bytes and lines of a file, decompressed on the way; a bad line is told apart from a bad file."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from posttrain.errors import UserError

LONGEST_LINE = 16 * 2**20  # bytes: what is longer is no row but a broken file
LARGEST_RATIO = 200  # of bytes that come out of a compressed file; text gives 3 to 20
BLOCK = 2**20


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what the operating system or a decompressor says about a file into a UserError."""
    try:
        yield
    except (gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{name}: not a whole compressed file ({error}); compress it again") from error
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{name}: cannot be read ({reason})") from error


def _zstd(file: Path) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd")


def _zip(file: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(file)
    return archive.open(zip_member(file))


def zip_member(file: Path) -> str:
    """The name of the one file in an archive. Raises UserError for an archive of several, of none, or that needs a password."""
    with zipfile.ZipFile(file) as archive:
        found = [each for each in archive.infolist() if not each.is_dir() and not each.filename.startswith(_OF_MACS)]
    if len(found) != 1:
        raise UserError(f"{file}: holds {len(found)} files where one is read; unpack it and give the directory")
    if found[0].flag_bits & _ENCRYPTED:
        raise UserError(f"{file}: needs a password; unpack it")
    return found[0].filename


_OF_MACS = "__MACOSX/"  # what macOS puts beside the files
_ENCRYPTED = 1
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
    ".zip": _zip,
}


def blocks(file: Path, name: str, compression: str) -> Iterator[bytes]:
    """The file's bytes, decompressed. Raises UserError for one that grows without an end."""
    size, total = file.stat().st_size, 0
    with COMPRESSIONS[compression](file) if compression else file.open("rb") as raw:
        while block := raw.read(BLOCK):
            total += len(block)
            if compression and total > max(LARGEST_RATIO * size, 4 * LONGEST_LINE):
                raise UserError(
                    f"{name}: holds more than {LARGEST_RATIO} times its size, as a decompression bomb does; unpack it"
                )
            yield block


def _byte_lines(file: Path, name: str, compression: str) -> Iterator[tuple[int, bytes | UserError]]:
    """Lines with their ends, numbered from 1; only a line feed ends a line. One that is too long is an error of its own."""
    number, rest, skipping = 1, b"", False
    for block in blocks(file, name, compression):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if not skipping:
                yield number, line + b"\n" if len(line) <= LONGEST_LINE else _too_long(name, number)
            number, skipping = number + 1, False
        if len(rest) > LONGEST_LINE or skipping:
            if not skipping:
                yield number, _too_long(name, number)
            rest, skipping = b"", True
    if rest and not skipping:
        yield number, rest


def _too_long(name: str, number: int) -> UserError:
    return UserError(f"{name}, line {number}: is longer than {LONGEST_LINE // 2**20} MB; break the row up")


def lines(file: Path, name: str, compression: str) -> Iterator[tuple[int, str | UserError]]:
    """Lines of a text file with their numbers; a UserError in place of one that is not UTF-8 or too long."""
    for number, line in _byte_lines(file, name, compression):
        if isinstance(line, UserError):
            yield number, line
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{line[error.start]:02x} at place {error.start + 1} of the line"
            yield number, UserError(f"{name}, line {number}: not UTF-8 ({wrong}); save the file as UTF-8")


def sound(found: Iterator[tuple[int, str | UserError]]) -> Iterator[str]:
    """The lines alone. Raises the first UserError among them."""
    for _, line in found:
        if isinstance(line, UserError):
            raise line
        yield line
