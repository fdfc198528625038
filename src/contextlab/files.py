"""Files that are written whole or not at all, with the operating system's errors in plain words."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from contextlab.errors import InputError, ResourceError


@contextmanager
def plain_os_errors(path: Path) -> Iterator[None]:
    """Turn OSError into a one-line ResourceError that names the path and the cause."""
    try:
        yield
    except OSError as error:
        causes = {
            errno.ENOSPC: "the disk is full; free some space or choose another folder with --out",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another folder with --out",
            errno.EROFS: "the file system is read-only; choose another folder with --out",
            errno.EACCES: "no permission to write there; choose another folder with --out",
            errno.EPERM: "no permission to write there; choose another folder with --out",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
            errno.EEXIST: "a file of that name is in the way",
        }
        why = causes.get(error.errno or 0, error.strerror or str(error))
        raise ResourceError(f"cannot write {path}: {why}") from error


def make_folder(path: Path) -> Path:
    """Create a folder (and its parents) if it is not there."""
    with plain_os_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that, whenever the process dies, either the old or the new content is there, whole."""
    data = content.encode() if isinstance(content, str) else content
    make_folder(path.parent)
    with plain_os_errors(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; it takes the name `path` only when all of it is on disk.

    A folder that was at `path` before is replaced.
    """
    make_folder(path.parent)
    with plain_os_errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            os.chmod(temporary, 0o777 & ~_umask())
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".old-{path.name}.", dir=path.parent))
                os.replace(path, old / path.name)
                os.replace(temporary, path)
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_json(path: Path, data: Any) -> None:
    """Write JSON, atomically."""
    write_atomic(path, json.dumps(data, indent=2, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError when the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or not JSON ({str(error).splitlines()[0]})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any shape to a safetensors file, atomically; those that share memory each in full."""
    held: dict[str, Tensor] = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, save(held))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: tensors of any shape, on the CPU.

    Raises InputError when it is missing, truncated or of another format.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: corrupt or truncated safetensors file ({str(error).splitlines()[0]})") from None
