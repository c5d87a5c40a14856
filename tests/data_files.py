"""What the tests of the data door share: inputs, arrays, files and readings of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import numpy_helper
from PIL import Image

from relief_onnx.data import Batch, Dataset, ImageOptions, InputSpec, open_dataset

F32, F16, I64, I32, U8 = (np.dtype(t) for t in (np.float32, np.float16, np.int64, np.int32, np.uint8))


def spec(*shape: int | str | None, name: str = "x", dtype: np.dtype[Any] = F32) -> InputSpec:
    return InputSpec(name, dtype, shape)


VEC = spec("N", 3)
PAIR = (spec("N", 3, name="a"), spec("N", "T", name="b", dtype=I64))
WHOLE = (spec("N", 3, name="a"), spec(name="sr", dtype=I64))
RGB = spec("N", 3, 4, 6)
GRAY = spec("N", 1, 4, 6)


def rows(n: int, *shape: int) -> np.ndarray:
    return np.arange(n * int(np.prod(shape or (3,)))).reshape(n, *(shape or (3,))).astype(np.float32)


def joined(batches: Iterator[Batch], name: str = "x") -> np.ndarray:
    return np.concatenate([batch.feed[name] for batch in batches])


def sizes(data: Dataset, batch_size: int, **options: int) -> list[int]:
    return [batch.size for batch in data.batches(batch_size, **options)]


def labels(data: Dataset, **options: int) -> list[Any]:
    return [label for batch in data.batches(2, **options) if batch.labels is not None for label in batch.labels.tolist()]


def save_image(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def save_pb(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, "any").SerializeToString())


def color_pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)


def read_all(source: Any, *inputs: InputSpec, **images: Any) -> list[Batch]:
    return list(open_dataset(source, inputs, images=ImageOptions(**images)).batches(2))


ONE = (VEC,)
NAN = np.array([[1, 2, 3], [4, np.nan, 6]])


def subset(total: int, limit: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))


def layout_npy_folder_of_samples(folder: Path) -> Path:
    for index, row in enumerate(rows(5)):
        np.save(folder / f"{index}.npy", row)
    (folder / "README.txt").write_text("hello")
    (folder / ".DS_Store").write_text("")
    return folder
