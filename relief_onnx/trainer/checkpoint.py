"""Where training stands, in one file that is written whole or not at all: arrays and a note, nothing pickled. Needs no torch."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.model import write_atomically

__all__ = ["read", "write"]

_NOTE = "note"


def write(path: Path, key: str, note: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keep `note` (what JSON can hold) and `arrays`. key: what they belong to. Raises OutputError."""
    text = json.dumps({"key": key, **note}).encode()
    buffer = io.BytesIO()
    contents: dict[str, Any] = {_NOTE: np.frombuffer(text, np.uint8)} | {f"array/{name}": value for name, value in arrays.items()}
    np.savez(buffer, **contents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read(path: Path, key: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """The note and the arrays; None where there is no such file, where it is damaged, or where it belongs to something else."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            note = json.loads(archive[_NOTE].tobytes())
            if note.pop("key", None) != key:
                return None
            return note, {name.removeprefix("array/"): archive[name] for name in archive.files if name != _NOTE}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # start again
