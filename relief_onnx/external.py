"""Results over 2 GB: an .onnx file with its weights in data files beside it, written whole or not at all.

The data files are laid out as the input's were: one file, several, or one for each tensor. Values start at multiples of a page, as mapping
them into memory needs it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from relief_onnx import aside
from relief_onnx.errors import OutputError

__all__ = ["Layout", "Origin", "layout", "write"]

# Windows maps files at multiples of this, others at 4096.
_PAGE = 1 << 16
_CHUNK = 1 << 26
_LONGEST_NAME = 200  # bytes; most file systems end at 255


@dataclass(frozen=True)
class Origin:
    """Where the input's external data lie: `places` by tensor, as the file says it, and `files`, which are never written to."""

    places: Mapping[str, str] = field(default_factory=dict)
    files: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Layout:
    """What will be written: `main`, the bytes of the .onnx file, and by data file the tensors in it with their offsets."""

    main: bytes
    files: Mapping[str, Sequence[tuple[TensorProto, int]]]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return len(self.main) + sum(_end(tensors) for tensors in self.files.values())

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the .onnx file."""
        return hashlib.sha256(self.main).hexdigest()


def layout(model: onnx.ModelProto, path: Path, origin: Origin) -> Layout:
    """How a model that is too large for one file will lie on disk.

    Raises OutputError where even what stays in the .onnx file is over 2 GB.
    """
    light = onnx.ModelProto()
    light.CopyFrom(aside.settled(model))
    grouped: dict[str, list[tuple[TensorProto, int]]] = {}
    names = _names(path, [item.name for item in aside.held(light)], origin)
    for item in aside.held(light):
        source = TensorProto()
        source.CopyFrom(item)
        tensors = grouped.setdefault(names[item.name], [])
        start = -(-_end(tensors) // _PAGE) * _PAGE
        tensors.append((source, start))
        del item.external_data[:]
        for key, value in (("location", names[item.name]), ("offset", str(start)), ("length", str(aside.array_of(source).nbytes))):
            item.external_data.add(key=key, value=value)
    try:
        main = light.SerializeToString(deterministic=True)
    except (EncodeError, ValueError):
        main = None
    if main is None or len(main) > aside.LIMIT:
        raise OutputError(
            f"{path} cannot be written: tensors in bodies, attributes or small initializers alone are over 2 GB, which one .onnx file "
            "cannot hold; prune more or split the model"
        )
    return Layout(main, grouped)


def write(model: onnx.ModelProto, path: Path, origin: Origin, check: Callable[[Path], None]) -> None:
    """Write the .onnx file and its data files, or nothing. `check` is called with the .onnx file while it lies in a folder of its own.

    What was there before is put back after an error or an interruption; of a process that is killed between two renames the .onnx file is
    missing, never one whose data are another's. Raises OutputError.
    """
    planned = layout(model, path, origin)
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free some space or choose another place") from error
    try:
        for name, tensors in planned.files.items():
            with _created(folder / name) as file:
                for tensor, start in tensors:
                    _put(file, tensor, start)
        with _created(folder / path.name) as file:
            file.write(planned.main)
        check(folder / path.name)
        _swap(folder, path, [*planned.files])
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free some space or choose another place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, path: Path, names: Sequence[str]) -> None:
    """Move new files to their places and old ones out of the way; undone where anything fails. The .onnx file goes first and comes last."""
    old = folder / "old"
    old.mkdir()
    with ExitStack() as undo:
        for name in (path.name, *names):
            if (path.parent / name).exists():
                _move(path.parent / name, old / name, undo)
        for name in (*names, path.name):
            _move(folder / name, path.parent / name, undo)
        undo.pop_all()


def _move(source: Path, target: Path, undo: ExitStack) -> None:
    undo.callback(_back, source, target)  # before, so that an interruption right after the move is undone too
    os.replace(source, target)


def _back(source: Path, target: Path) -> None:
    if not source.exists():
        os.replace(target, source)


def _names(path: Path, tensors: Sequence[str], origin: Origin) -> dict[str, str]:
    """The data file of every tensor. No file is taken that is there already, but for those of the file that is replaced."""
    locations = origin.places
    counts = Counter(locations[name] for name in tensors if name in locations)
    single = len(locations) > 1 and len(set(locations.values())) == len(locations)
    most = counts.most_common(1)[0][0] if counts else ""
    several = len(set(locations.values())) > 1
    own = _own_data(path, origin)
    chosen: dict[str, str] = {}
    taken = {path.name}

    def named(place: str) -> str:
        if place not in chosen:
            base = re.sub(r"[^\w.-]+", "_", place)
            wanted = f"{path.name}.{base}" if several else f"{path.name}.data"
            wanted = wanted if len(wanted.encode()) <= _LONGEST_NAME else f"{path.name}.{len(chosen)}.data"
            stem, end = (wanted.removesuffix(".data"), ".data") if wanted.endswith(".data") else (wanted, "")
            free, number = wanted, 1
            while free in taken or (os.path.lexists(path.parent / free) and free not in own):
                number += 1
                free = f"{stem}.{number}{end}"
            taken.add(free)
            chosen[place] = free
        return chosen[place]

    return {name: named(locations.get(name, name if single else most)) for name in tensors}


def _own_data(path: Path, origin: Origin) -> set[str]:
    """Data files that the model at `path` names, that are named after it and are not the input's: those may be replaced with it."""
    old = onnx.ModelProto()
    try:
        old.ParseFromString(path.read_bytes())
    except (OSError, DecodeError):
        return set()  # nothing is there, or something else than a model
    found = {entry.value for item in aside.tensors_of(old.graph) for entry in item.external_data if entry.key == "location"}
    own = {name for name in found if name.startswith(f"{path.name}.") and Path(name).name == name}
    return {name for name in own if (path.parent / name).resolve() not in origin.files}


def _end(tensors: Sequence[tuple[TensorProto, int]]) -> int:
    """Where the last of the tensors ends."""
    return tensors[-1][1] + aside.array_of(tensors[-1][0]).nbytes if tensors else 0


def _put(file: IO[bytes], tensor: TensorProto, start: int) -> None:
    file.seek(start)
    content = np.ascontiguousarray(aside.array_of(tensor)).reshape(-1).view(np.uint8)
    for place in range(0, len(content), _CHUNK):
        file.write(content[place : place + _CHUNK].data)


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on disk when the block ends."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
