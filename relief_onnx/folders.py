"""What lies at a path: which format, which files, and whether sub-folders are classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relief_onnx.data_checks import Array, Feed
from relief_onnx.dataset import Dataset, Part, check_labelled
from relief_onnx.errors import DataError
from relief_onnx.images import decode_image, plan_images
from relief_onnx.readers import PB_NAME, Parts, Reader, Want, only_input, read_npy, read_npz, read_pb
from relief_onnx.tables import read_csv, read_label_table

__all__ = ["FORMATS", "open_path"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
FORMATS = f".npy, .npz, .csv, images ({' '.join(IMAGE_SUFFIXES)}) and ONNX test_data_set_*/input_*.pb"
LABEL_TABLE = "labels.csv"

_KIND_OF_SUFFIX = {".npy": "npy", ".npz": "npz", ".csv": "csv", ".pb": "pb"} | dict.fromkeys(IMAGE_SUFFIXES, "images")


def _read_images(files: Sequence[Path], want: Want) -> Parts:
    plan = plan_images(only_input(want, f"'{files[0]}'", "give .npz files with these keys"), want.images)

    def part(path: Path) -> Part:
        def read() -> tuple[Feed, None]:
            return {plan.spec.name: decode_image(path, plan)}, None

        return Part(f"'{path}'", 1, read)

    return Parts([part(path) for path in files])


_READERS: dict[str, Reader] = {"npy": read_npy, "npz": read_npz, "csv": read_csv, "pb": read_pb, "images": _read_images}


class _Found(NamedTuple):
    kind: str
    files: list[Path]
    parts: list[Part]
    class_names: tuple[str, ...] = ()


class _Folder(NamedTuple):
    """The visible content of a folder, in sorted order."""

    path: Path
    by_kind: dict[str, list[Path]]
    others: list[Path]
    folders: list[Path]

    @property
    def files(self) -> list[Path]:
        return [path for files in self.by_kind.values() for path in files]


def _look(path: Path) -> _Folder:
    by_kind: dict[str, list[Path]] = {}
    others, folders = [], []
    try:
        content = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"'{path}' cannot be listed ({error.strerror}); check its permissions.") from error
    for item in content:
        if item.name.startswith((".", "__")):  # what systems leave behind, such as __MACOSX
            continue
        kind = _KIND_OF_SUFFIX.get(item.suffix.lower())
        if kind == "pb" and not PB_NAME.fullmatch(item.name):
            kind = None
        if item.is_dir():
            folders.append(item)
        elif kind:
            by_kind.setdefault(kind, []).append(item)
        else:
            others.append(item)
    return _Folder(path, by_kind, others, folders)


def open_path(path: Path, want: Want) -> Dataset:
    """Find the format of a file or folder and read its headers."""
    if not path.exists():
        raise DataError(f"'{path}' does not exist; check the path of the data.")
    found = _open_folder(path, want) if path.is_dir() else _open_file(path, want)
    root = path if path.is_dir() else path.parent
    names = tuple(file.relative_to(root).as_posix() for file in found.files)
    return Dataset(
        kind=found.kind,
        source=str(path),
        samples=sum(part.rows for part in found.parts),
        labelled=check_labelled(found.parts),
        class_names=found.class_names,
        fingerprint=_fingerprint(found, names, want),
        inputs=want.inputs,
        parts=found.parts,
        files=names,
        notes=_notes(path, found.files),
    )


def _fingerprint(found: _Found, names: Sequence[str], want: Want) -> str:
    digest = hashlib.sha256(repr((found.kind, want.images)).encode())
    for name, file in zip(names, found.files, strict=True):
        status = file.stat()
        digest.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _notes(path: Path, used: Sequence[Path]) -> tuple[str, ...]:
    """Says which files beside the data were left aside; output_*.pb and models belong to ONNX test data."""
    if not path.is_dir():
        return ()
    folders = {path, *(file.parent for file in used)}
    aside = [other for folder in sorted(folders) for other in _look(folder).others if other.suffix not in (".pb", ".onnx")]
    if not aside:
        return ()
    return (f"{len(aside)} files of other formats were left aside, such as '{aside[0].name}'",)


def _open_file(path: Path, want: Want) -> _Found:
    kind = _KIND_OF_SUFFIX.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"'{path}' has a format that relief-onnx does not read; it understands {FORMATS}.")
    if kind == "pb" and not PB_NAME.fullmatch(path.name):
        raise DataError(f"'{path}' is not named input_K.pb; rename it, K being the place of its input in the model.")
    parts, names = _READERS[kind]([path], want)
    return _Found(kind, [path], parts, names)


def _open_folder(path: Path, want: Want) -> _Found:
    here = _look(path)
    sets = [item for item in here.folders if item.name.startswith("test_data_set_")]
    if sets or "pb" in here.by_kind:
        return _open_pb(here, sets, want)
    inside = [folder for folder in map(_look, here.folders) if folder.files]
    table = next((file for file in here.by_kind.get("csv", []) if file.name.lower() == LABEL_TABLE), None)
    images = [file for folder in (here, *inside) for file in folder.by_kind.get("images", [])]
    if table and images:
        return _open_label_table(table, images, [here, *inside], want)
    if table and len(here.files) > 1:
        raise DataError(f"'{table}' is for images, and there are none; put the labels into a column or array named 'label'.")
    if here.files and inside:
        raise DataError(f"'{path}' holds data both directly and in the sub-folder '{inside[0].path.name}'; keep one of the two.")
    if here.files:
        return _open_flat(here, want)
    if not inside:
        raise _nothing(here)
    if len(here.folders) == 1:  # one class says nothing: it is just a level more
        return _open_flat(inside[0], want)
    return _open_classes(here, inside, want)


def _nothing(folder: _Folder) -> DataError:
    where = f"'{folder.path}'"
    if not folder.others and not folder.folders:
        return DataError(f"{where} is empty; put the samples there as {FORMATS}.")
    kinds = Counter(other.suffix or "no suffix" for other in folder.others) or Counter({"sub-folders without data": 1})
    found = ", ".join(sorted(kinds))
    return DataError(f"{where} holds nothing that relief-onnx reads (found {found}); it understands {FORMATS}.")


def _one_kind(folder: _Folder) -> str:
    if len(folder.by_kind) > 1:
        kinds = " and ".join(f"'{files[0].name}' ({kind})" for kind, files in sorted(folder.by_kind.items()))
        raise DataError(f"'{folder.path}' mixes formats: {kinds}; keep one format in a folder, or name the labels of images {LABEL_TABLE}.")
    return next(iter(folder.by_kind))


def _open_flat(folder: _Folder, want: Want) -> _Found:
    kind = _one_kind(folder)
    parts, names = _READERS[kind](folder.files, want)
    return _Found(kind, folder.files, parts, names)


def _open_pb(here: _Folder, sets: Sequence[Path], want: Want) -> _Found:
    """Every test_data_set_* folder in the order of its number, or this folder as one set."""
    ordered = sorted(sets, key=lambda item: (len(item.name), item.name))
    groups = [_look(item) for item in ordered] if ordered else [here]
    parts: list[Part] = []
    files: list[Path] = []
    for group in groups:
        own = group.by_kind.get("pb", [])
        if not own:
            raise DataError(f"'{group.path}' holds no input_*.pb file; add the inputs or remove the folder.")
        parts += read_pb(own, want).parts
        files += own
    return _Found("pb", files, parts)


def _open_classes(here: _Folder, inside: Sequence[_Folder], want: Want) -> _Found:
    """Each sub-folder is a class; its place in the sorted names is the class number."""
    empty = sorted(set(here.folders) - {folder.path for folder in inside})
    if empty:
        raise DataError(f"'{empty[0]}' holds no samples, though the folders beside it do; fill or remove this class.")
    kinds = {_one_kind(folder): folder for folder in inside}
    if len(kinds) > 1:
        found = " and ".join(f"'{folder.path.name}' ({kind})" for kind, folder in sorted(kinds.items()))
        raise DataError(f"'{here.path}' mixes formats in its class folders: {found}; keep one format.")
    kind = next(iter(kinds))
    parts: list[Part] = []
    for number, folder in enumerate(inside):
        for part in _READERS[kind](folder.files, want).parts:
            if part.labelled:
                raise DataError(
                    f"{part.source} has labels of its own beside those of its class folder '{folder.path.name}'; keep one kind of labels."
                )
            parts.append(_labelled(part, np.full(part.rows, number, np.int64)))
    files = [file for folder in inside for file in folder.files]
    return _Found(kind, files, parts, tuple(folder.path.name for folder in inside))


def _open_label_table(table: Path, images: Sequence[Path], folders: Sequence[_Folder], want: Want) -> _Found:
    others = [file for folder in folders for file in folder.files if file != table and file not in images]
    if others:
        raise DataError(f"'{table.parent}' mixes images and '{others[0].name}'; keep one format in a folder.")
    root = table.parent
    by_name = {file.relative_to(root).as_posix(): file for file in images}
    labels, names = read_label_table(table, by_name)
    parts = _read_images(list(by_name.values()), want).parts
    labelled = [_labelled(part, np.array([labels[name]])) for name, part in zip(by_name, parts, strict=True)]
    return _Found("images", [*images, table], labelled, names)


def _labelled(part: Part, labels: Array) -> Part:
    def read() -> tuple[Feed, Array]:
        return part.read()[0], labels

    return replace(part, read=read, labelled=True)
