"""Array files as parts: .npy, .npz, ONNX test data (.pb) and .csv.

A reader gets the files of one folder in order and returns their parts and class names. Headers are checked at once,
values when they are read. Nothing is ever unpickled.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from relief_onnx.data_checks import (
    Array,
    BatchAxis,
    Feed,
    Header,
    batch_axis,
    check_headers,
    check_label_header,
    check_names,
    label_key,
    lift,
    specs_text,
)
from relief_onnx.dataset import Part
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError
from relief_onnx.images import ImageOptions

__all__ = ["PB_NAME", "Parts", "Want", "only_input", "read_npy", "read_npz", "read_pb"]

PB_NAME = re.compile(r"input_(\d+)\.pb")

_BROKEN_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    KeyError,
)


class Want(NamedTuple):
    """What the data has to fit."""

    inputs: tuple[InputSpec, ...]
    images: ImageOptions

    @property
    def axis(self) -> BatchAxis:
        return batch_axis(self.inputs)


class Parts(NamedTuple):
    """What a reader found."""

    parts: list[Part]
    class_names: tuple[str, ...] = ()


def only_input(want: Want, source: str, fix: str) -> InputSpec:
    """The model's single input, for formats that cannot name one."""
    if len(want.inputs) != 1:
        raise DataError(
            f"{source} does not say which input it is for, and the model has {len(want.inputs)}: {specs_text(want.inputs)}; {fix}."
        )
    return want.inputs[0]


def _unreadable(path: Path, kind: str, cause: Exception, fix: str = "save it again") -> DataError:
    reason = str(cause).split("\n")[0].rstrip(".") or type(cause).__name__
    return DataError(f"'{path}' is no readable {kind} file ({reason}); {fix}.")


# --- .npy -----------------------------------------------------------------------------------------------------------


def _npy_header(stream: IO[bytes], source: str, name: str) -> Header:
    """Shape and type of a .npy stream, which then stands at the values. Refuses what only pickle can read."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"unknown .npy version {version[0]}.{version[1]}")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise DataError(
            f"{source} holds Python objects in {name} that only pickle can read, and relief-onnx never unpickles "
            "because a pickle "
            "can run code; save a plain array, for example np.save(file, array.astype('float32'))."
        )
    return Header(shape, dtype)


def _npy_file_header(path: Path) -> Header:
    try:
        with path.open("rb") as stream:
            header = _npy_header(stream, f"'{path}'", "its array")
            have = path.stat().st_size - stream.tell()
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable(path, ".npy", error, "save it again with np.save, and not as a pickle") from error
    need = int(np.prod(header.shape, dtype=np.int64)) * header.dtype.itemsize
    if have < need:
        raise DataError(f"'{path}' is cut short: {have} bytes of values where its header asks for {need}; copy it again.")
    return header


def _load_npy(path: Path) -> Array:
    """A memory map of a file whose header has been checked."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _unreadable(path, ".npy", error) from error
    return array


def file_stem(name: str) -> str:
    """The stem of the .npy file for an input: what a file system may refuse becomes an underscore."""
    return re.sub(r"[^\w.\-]", "_", name)


def read_npy(files: Sequence[Path], want: Want) -> Parts:
    """One file per input (NAME.npy), or for a single input any number of files; labels in label.npy or labels.npy."""
    by_stem = {path.stem: path for path in files}
    folder = f"'{files[0].parent}'"
    key = label_key(by_stem, want.inputs, folder)
    label_path = by_stem.pop(key) if key else None
    if not by_stem:
        raise DataError(f"{folder} holds labels but no samples; put the samples beside them as .npy files.")
    names = {file_stem(spec.name): spec.name for spec in want.inputs}
    if len(want.inputs) > 1 or set(by_stem) == set(names):
        if len(files) == 1 and len(want.inputs) > 1:
            only_input(want, f"'{files[0]}'", "give a folder with one NAME.npy per input, or an .npz file with these keys")
        named = {names.get(stem, stem): path for stem, path in by_stem.items()}
        parts = [_named_npy(named, folder, want)]
    else:
        parts = [_single_npy(path, want) for path in by_stem.values()]
    return Parts(_with_label_file(parts, label_path) if label_path else parts)


def _named_npy(paths: Mapping[str, Path], folder: str, want: Want) -> Part:
    source = f"'{next(iter(paths.values()))}'" if len(paths) == 1 else folder
    check_names(paths, want.inputs, source)
    headers = {name: _npy_file_header(path) for name, path in paths.items()}
    rows = check_headers(headers, want.inputs, want.axis, source)

    def read() -> tuple[Feed, None]:
        return {spec.name: lift(_load_npy(paths[spec.name]), spec, want.axis) for spec in want.inputs}, None

    return Part(source, rows, read)


def _single_npy(path: Path, want: Want) -> Part:
    return _named_npy({want.inputs[0].name: path}, "", want)


def _with_label_file(parts: Sequence[Part], path: Path) -> list[Part]:
    """Labels in one file for all parts, in their order."""
    source = f"'{path}'"
    header = _npy_file_header(path)
    check_label_header(header, sum(part.rows for part in parts), source)

    def labelled(part: Part, start: int) -> Part:
        def read() -> tuple[Feed, Array]:
            labels = np.atleast_1d(_load_npy(path))
            return part.read()[0], labels[start : start + part.rows]

        return Part(part.source, part.rows, read, True)

    starts = np.cumsum([0, *(part.rows for part in parts)])
    return [labelled(part, int(start)) for part, start in zip(parts, starts, strict=False)]


# --- .npz -----------------------------------------------------------------------------------------------------------


def read_npz(files: Sequence[Path], want: Want) -> Parts:
    """Each file is a batch, a sample or a whole feed; its keys are the inputs' names, with an optional label."""
    return Parts([_npz_part(path, want) for path in files])


def _npz_headers(path: Path) -> dict[str, Header]:
    headers = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    headers[name] = _npy_header(stream, f"'{path}'", f"'{name}'")
    except _BROKEN_ZIP as error:
        raise _unreadable(path, ".npz", error, "save it again with np.savez") from error
    return headers


def _npz_part(path: Path, want: Want) -> Part:
    source = f"'{path}'"
    headers = _npz_headers(path)
    key = label_key(headers, want.inputs, source)
    label = headers.pop(key) if key else None
    rows = check_headers(headers, want.inputs, want.axis, source)
    if label:
        check_label_header(label, rows, source)

    def read() -> tuple[Feed, Array | None]:
        try:
            with np.load(path, allow_pickle=False) as archive:
                feed = {spec.name: lift(archive[spec.name], spec, want.axis) for spec in want.inputs}
                return feed, archive[key] if key else None
        except _BROKEN_ZIP as error:
            raise _unreadable(path, ".npz", error, "save it again with np.savez") from error

    return Part(source, rows, read, label is not None)


# --- ONNX test data -------------------------------------------------------------------------------------------------


def _pb_number(path: Path) -> int:
    match = PB_NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def read_pb(files: Sequence[Path], want: Want) -> Parts:
    """The input_K.pb files of one folder: K counts the model's inputs."""
    ordered = sorted(files, key=_pb_number)
    found = [_pb_number(path) for path in ordered]
    where = f"'{ordered[0].parent}'"
    if found != list(range(len(want.inputs))):
        names = ", ".join(path.name for path in ordered)
        raise DataError(
            f"{where} holds {names}, but the model has {len(want.inputs)} inputs: {specs_text(want.inputs)}; "
            f"give input_0.pb to input_{len(want.inputs) - 1}.pb, one per input in this order."
        )
    source = f"'{ordered[0]}'" if len(ordered) == 1 else where
    paths = dict(zip((spec.name for spec in want.inputs), ordered, strict=True))
    headers = {}
    for name, path in paths.items():
        array = _load_pb(path)
        headers[name] = Header(array.shape, array.dtype)
    rows = check_headers(headers, want.inputs, want.axis, source)

    def read() -> tuple[Feed, None]:
        return {spec.name: lift(_load_pb(paths[spec.name]), spec, want.axis) for spec in want.inputs}, None

    return Parts([Part(source, rows, read)])


def _load_pb(path: Path) -> Array:
    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values are in another file")
        array: Array = numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError, KeyError, OSError) as error:
        raise _unreadable(path, "TensorProto", error, "save it with onnx.numpy_helper.from_array(array).SerializeToString()") from error
    return array


Reader = Callable[[Sequence[Path], Want], Parts]
