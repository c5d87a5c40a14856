"""Text tables: .csv files of samples, and labels.csv beside images."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relief_onnx.data_checks import LABEL_KEYS, Array, Feed, family, spec_text
from relief_onnx.dataset import Part
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError
from relief_onnx.readers import Parts, Want, only_input

__all__ = ["class_numbers", "read_csv", "read_label_table"]

_BLOCK_CELLS = 2**20  # cells that are parsed at once
_DELIMITERS = (",", ";", "\t")


class _Line(NamedTuple):
    number: int
    offset: int
    delimiter: str
    cells: list[str]


def _lines(path: Path, offset: int = 0, number: int = 1, delimiter: str | None = None) -> Iterator[_Line]:
    """The lines that are not blank, with their place, from a byte offset on."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            for index, raw in enumerate(stream):
                text = raw.decode("utf-8-sig" if offset == 0 else "utf-8").strip("\r\n")
                if text.strip():
                    delimiter = delimiter or next((mark for mark in _DELIMITERS if mark in text), ",")
                    cells = next(csv.reader([text], delimiter=delimiter, strict=True))
                    yield _Line(number + index, offset, delimiter, [cell.strip() for cell in cells])
                offset += len(raw)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{path}' is no readable .csv file ({error}); save it again as comma-separated UTF-8 text.") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def class_numbers(labels: Sequence[str], source: str) -> tuple[Array, tuple[str, ...]]:
    """Labels from text: whole numbers as int64, numbers as float64, names as their place in the sorted names."""
    empty = next((index for index, label in enumerate(labels) if not label), None)
    if empty is not None:
        raise DataError(f"{source} has an empty label in row {empty + 1} of its samples; fill it in or remove the row.")
    if all(label.lstrip("+-").isdecimal() for label in labels):
        return np.array([int(label) for label in labels], np.int64), ()
    if all(_is_number(label) for label in labels):
        return np.array([float(label) for label in labels]), ()
    names = sorted(set(labels))
    place = {name: index for index, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int64), tuple(names)


class _Table(NamedTuple):
    path: Path
    delimiter: str
    label_column: int | None
    shape: tuple[int, ...]  # of one sample
    blocks: list[tuple[int, int, int]]  # byte offset, line number, rows
    labels: list[str]


def read_csv(files: Sequence[Path], want: Want) -> Parts:
    """Rows of flattened values for a single input, with an optional column 'label'."""
    source = f"'{files[0]}'"
    spec = only_input(want, source, "give .npz files with these keys")
    tables = [_scan(path, spec) for path in files]
    stored = [label for table in tables for label in table.labels]
    labels, names = class_numbers(stored, source) if stored else (None, ())
    parts, start = [], 0
    for table in tables:
        for block in table.blocks:
            own = labels[start : start + block[2]] if labels is not None and table.label_column is not None else None
            start += 0 if own is None else block[2]
            parts.append(_block_part(table, block, own, spec))
    return Parts(parts, names)


def _scan(path: Path, spec: InputSpec) -> _Table:
    """One pass over the text: where the blocks start, the widths, the labels."""
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"'{path}' is empty; give one row of values per sample.")
    has_header = any(cell and not _is_number(cell) for cell in first.cells)  # an empty cell is a hole in the data
    columns = [index for index, cell in enumerate(first.cells) if has_header and cell.lower() in LABEL_KEYS]
    if len(columns) > 1:
        raise DataError(f"'{path}' has more than one label column; keep one.")
    column = columns[0] if columns else None
    width = len(first.cells)
    shape = _row_shape(path, spec, width - len(columns))
    per_block = max(1, min(1024, _BLOCK_CELLS // width))
    blocks: list[tuple[int, int, int]] = []
    labels: list[str] = []
    for line in lines if has_header else chain([first], lines):
        _check_width(path, line, width)
        if not blocks or blocks[-1][2] == per_block:
            blocks.append((line.offset, line.number, 0))
        offset, number, rows = blocks[-1]
        blocks[-1] = (offset, number, rows + 1)
        if column is not None:
            labels.append(line.cells[column])
    if not blocks:
        raise DataError(f"'{path}' has a header but no rows; give one row of values per sample.")
    return _Table(path, first.delimiter, column, shape, blocks, labels)


def _check_width(path: Path, line: _Line, width: int) -> None:
    if len(line.cells) != width:
        raise DataError(
            f"'{path}' has {len(line.cells)} columns in line {line.number} but {width} in its first line; give every row the same columns."
        )


def _row_shape(path: Path, spec: InputSpec, width: int) -> tuple[int, ...]:
    """The shape of one sample with `width` values; one open axis is worked out."""
    if not spec.ranked:
        return (width,)
    trailing = spec.shape[1:]
    fixed = math.prod(size for size in trailing if isinstance(size, int))
    unknown = sum(not isinstance(size, int) for size in trailing)
    fits = width == fixed if unknown == 0 else unknown == 1 and 0 < fixed <= width and width % fixed == 0
    if not spec.shape or not fits:
        wanted = str(fixed) if not unknown else f"a multiple of {fixed}"
        raise DataError(
            f"'{path}' has {width} columns of values, but the model's input {spec_text(spec)} needs {wanted} per "
            "sample; "
            "give one column per value and name a column 'label' if it holds labels, or save .npy files of the "
            "input's shape."
        )
    return tuple(size if isinstance(size, int) else width // fixed for size in trailing)


def _block_part(table: _Table, block: tuple[int, int, int], labels: Array | None, spec: InputSpec) -> Part:
    def read() -> tuple[Feed, Array | None]:
        return {spec.name: _values(table, block, spec)}, labels

    return Part(f"'{table.path}'", block[2], read, labels is not None)


def _values(table: _Table, block: tuple[int, int, int], spec: InputSpec) -> Array:
    offset, number, rows = block
    values = np.full((rows, math.prod(table.shape)), np.nan)  # NaN is refused later, should the file shrink meanwhile
    lines = _lines(table.path, offset, number, table.delimiter)
    for row, line in zip(values, lines, strict=False):
        cells = [cell for index, cell in enumerate(line.cells) if index != table.label_column]
        bad = next((cell for cell in cells if not _is_number(cell)), None)
        if bad is not None:
            found = f"'{bad}'" if bad else "an empty cell"
            raise DataError(
                f"'{table.path}' has {found} in line {line.number} where input {spec_text(spec)} needs numbers; fill in or remove the row."
            )
        row[:] = [float(cell) for cell in cells]
    if family(spec.dtype) == "int" and np.array_equal(values, np.rint(values)):
        return values.astype(np.int64).reshape(rows, *table.shape)
    return values.reshape(rows, *table.shape)


def read_label_table(path: Path, images: Mapping[str, Path]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """labels.csv: the label of each image by its name relative to the folder, and the class names.

    A first line whose first cell names no image is a header.
    """
    source = f"'{path}'"
    rows: dict[str, str] = {}
    for index, line in enumerate(_lines(path)):
        if len(line.cells) != 2:
            raise DataError(f"{source} has {len(line.cells)} columns in line {line.number}; give two, the file name and its label.")
        name, label = line.cells
        if name not in images:
            if index == 0 and not Path(name).suffix:
                continue
            raise DataError(f"{source} names '{name}' in line {line.number}, which is not in its folder; correct or remove the line.")
        if name in rows:
            raise DataError(f"{source} names '{name}' twice; keep one line for each image.")
        rows[name] = label
    missing = [name for name in images if name not in rows]
    if missing:
        raise DataError(f"{source} has no label for '{missing[0]}' ({len(missing)} images lack one); add its line, or remove the image.")
    numbers, names = class_numbers(list(rows.values()), source)
    return dict(zip(rows, numbers, strict=True)), names
