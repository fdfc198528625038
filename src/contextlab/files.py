"""Files that are written whole or not at all and checked when read; the system's errors in plain words."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from contextlab.errors import InputError, ResourceError

CHECKSUM = "checksum"
"""The key under which a record holds the SHA-256 of all its other keys."""

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder with --out",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder with --out",
    errno.EROFS: "the file system is read-only; choose another folder with --out",
    errno.EACCES: "no permission to write there; choose another folder with --out",
    errno.EPERM: "no permission to write there; choose another folder with --out",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file of that name is in the way",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "the name is longer than the file system allows",
    errno.ELOOP: "a link in the path leads back to itself",
}


def short(path: object) -> str:
    """A path for a message: on one line, a very long one cut."""
    text = str(path).encode("unicode_escape").decode() if not str(path).isprintable() else str(path)
    return text if len(text) <= 300 else f"{text[:120]}...{text[-60:]}"


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """Turn OSError, and what no path may hold, into a one-line ResourceError that names the path and the cause."""
    try:
        yield
    except OSError as error:
        why = _CAUSES.get(error.errno or 0, error.strerror or str(error))
        raise ResourceError(f"cannot write {short(path)}: {why}") from error
    except ValueError as error:
        if isinstance(error, InputError) or not re.search("null (byte|character)|surrogate", str(error)):
            raise
        raise ResourceError(f"cannot write {short(path)}: no path may hold such characters") from error


def present(path: Path) -> bool:
    """Whether anything is at the path; False for a path that cannot be, such as one of too long a name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def make_folder(path: Path) -> Path:
    """Create a folder (and its parents) if it is not there."""
    with plain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def own_folder(path: Path) -> Path:
    """Create a folder to write into if it is not there. Raises InputError where a file or a link bears its name."""
    with plain_os_errors(path):
        if path.is_symlink():
            raise InputError(f"{short(path)}: is a link; expected a folder, or a name that is free")
        if path.exists() and not path.is_dir():
            raise InputError(f"{short(path)}: is a file; expected a folder, or a name that is free")
    return make_folder(path)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that, whenever the process dies, either the old or the new content is there, whole.

    Its mode is the one that `open(path, "w")` gives: that of the old file, or what the umask leaves of 0o666.
    """
    data = content.encode() if isinstance(content, str) else content
    make_folder(path.parent)
    with plain_os_errors(path):
        temporary = path.parent / _temporary_name(path)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                if path.is_file() and not path.is_symlink():
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _temporary_name(path: Path) -> str:
    """A name that no other writer takes, and that is not too long where the path's own is not."""
    return f".{path.name[:40]}.{secrets.token_hex(6)}"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it takes the name `path` only when all of it is on disk.

    Raises InputError where anything bears that name already: nothing is ever deleted to make room.
    """
    make_folder(path.parent)
    with plain_os_errors(path):
        if path.exists() or path.is_symlink():
            raise InputError(f"{short(path)}: is there already; remove it or choose another name")
        temporary = path.parent / _temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file. Raises BlockingIOError where another process does, unless told to wait for it.

    Raises InputError where a link or anything else than a file bears the name: a lock must not write elsewhere.
    """
    with plain_os_errors(path):
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
                raise
            raise InputError(f"{short(path)}: expected a lock, which is an empty file; remove what is there") from None
    with os.fdopen(handle, "r+b", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputError(f"{short(path)}: expected a lock, which is an empty file; remove what is there")
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read. Raises InputError when it is missing or no regular file, which could be without end."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait
    except FileNotFoundError:
        raise InputError(f"{short(path)}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{short(path)}: cannot be read ({_reason(error)})") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise InputError(f"{short(path)}: is {what}; expected a file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_text(path: Path, largest: int = 1 << 30) -> str:
    """The text of a regular file. Raises InputError when it has more than `largest` bytes or is not UTF-8."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise InputError(f"{short(path)}: {size} bytes; expected at most {largest}")
        try:
            return file.read(largest + 1).decode()
        except UnicodeDecodeError:
            raise InputError(f"{short(path)}: not a text file in UTF-8") from None
        except OSError as error:
            raise InputError(f"{short(path)}: cannot be read ({_reason(error)})") from None


def write_json(path: Path, data: Any) -> None:
    """Write JSON, atomically."""
    write_atomic(path, json.dumps(data, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError when the file is missing or damaged."""
    try:
        return json.loads(read_text(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{short(path)}: damaged or not JSON ({_reason(error)})") from None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, atomically, with its own checksum: `read_record` notices each changed value."""
    plain = json.loads(json.dumps(dict(record)))
    write_json(path, {**plain, CHECKSUM: _digest(plain)})


def read_record(
    path: Path, keys: Mapping[str, type | tuple[type, ...]] | None = None, otherwise: str = ""
) -> dict[str, Any]:
    """Read a record: JSON of a mapping that holds the keys wanted, each of the type wanted.

    keys: name -> type, or types of which one is enough. otherwise: what the user can do where the file is no such
    record, for example "delete it to measure again".

    Returns it without its checksum (`write_record` adds one, `write_json` none). Raises InputError that names the file
    and what is wrong with it: missing, damaged, of another shape, changed since it was written.
    """
    what = f"; {otherwise}" if otherwise else ""
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"{error}{what}") from None
    if not isinstance(record, dict):
        raise InputError(f"{short(path)}: damaged: expected a mapping, found a {type(record).__name__}{what}")
    written = record.pop(CHECKSUM, None)
    if written != _digest(record) if written is not None else _has_lost_its_checksum(record):
        raise InputError(f"{short(path)}: damaged: it has changed since it was written (its checksum differs){what}")
    for name, types in (keys or {}).items():
        if name not in record:
            raise InputError(f"{short(path)}: damaged: it lacks the key {name!r}{what}")
        value = record[name]
        wanted = types if isinstance(types, tuple) else (types,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            expected = " or ".join(each.__name__ for each in wanted)
            raise InputError(f"{short(path)}: damaged: {name!r} is a {type(value).__name__}, expected {expected}{what}")
    return record


def _has_lost_its_checksum(record: Mapping[str, Any]) -> bool:
    """Whether the checksum stands under another name: of a record that never had one, no value is that of the rest."""
    size = len(_digest({}))
    names = [name for name, value in record.items() if isinstance(value, str) and len(value) == size]
    return any(record[name] == _digest({k: v for k, v in record.items() if k != name}) for name in names)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a regular file. Raises InputError when it is missing or cannot be read."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{short(path)}: cannot be read ({_reason(error)})") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors of any shape to a safetensors file, atomically; those that share memory each in full.

    Returns the SHA-256 of the file, for `read_tensors`.
    """
    data = pack_tensors(tensors)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file that holds these tensors, of any shape."""
    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file: tensors of any shape, on the CPU.

    sha256: of the file as it was written; None is not compared.

    Raises InputError when it is missing, truncated, of another format or has another checksum.
    """
    with open_regular(path):
        pass
    found = file_digest(path) if sha256 is not None else None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{short(path)}: corrupt or truncated safetensors file ({_reason(error)})") from None
    if found != sha256:
        raise InputError(f"{short(path)}: damaged: it has changed since it was written (its checksum differs)")
    return tensors


def _reason(error: Exception) -> str:
    """Why, in one short line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.splitlines() or [type(error).__name__])[0][:200]
