"""Images changed at random while training: flipped left to right, shifted by a crop of the padded image. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import RecipeError

__all__ = ["augment", "check_images"]

Array = NDArray[Any]

# An image is moved by up to this part of its size.
SHIFT = 8


def check_images(inputs: Sequence[InputSpec], wanted: Sequence[str]) -> None:
    """Raises RecipeError where images are to be changed and no input holds any."""
    if wanted and not any(_is_image(spec.shape) for spec in inputs):
        raise RecipeError("augment changes images, but no input of the model has 4 axes with 1 or 3 channels; leave it out")


def _is_image(shape: Sequence[Any]) -> bool:
    return len(shape) == 4 and (shape[1] in (1, 3) or shape[3] in (1, 3))


def augment(feed: Mapping[str, Array], wanted: Sequence[str], rng: np.random.Generator) -> dict[str, Array]:
    """A copy of the feed with its images [N, C, H, W] or [N, H, W, C] changed; all images of one sample in the same way."""
    found = dict(feed)
    count = next((len(value) for value in feed.values() if _is_image(value.shape)), 0)
    flips, moves = rng.random(count) < 0.5, rng.random((count, 2))
    for name, value in feed.items():
        if not _is_image(value.shape) or len(value) != count:
            continue
        height, width = (2, 3) if value.shape[1] in (1, 3) else (1, 2)
        image = value.copy()
        if "flip" in wanted:
            image[flips] = np.flip(image[flips], width)
        if "crop" in wanted:
            image = _shifted(image, height, width, moves)
        found[name] = image
    return found


def _shifted(images: Array, height: int, width: int, moves: Array) -> Array:
    """Each image cut out of itself with a border of zeros; moves: where, in [0, 1)."""
    border = [max(images.shape[axis] // SHIFT, 1) for axis in (height, width)]
    pads = [(0, 0)] * images.ndim
    pads[height], pads[width] = (border[0], border[0]), (border[1], border[1])
    padded = np.pad(images, pads)
    result = np.empty_like(images)
    for number, (down, right) in enumerate((moves * (2 * np.array(border) + 1)).astype(int)):
        window: list[slice] = [slice(None)] * (images.ndim - 1)
        window[height - 1] = slice(down, down + images.shape[height])
        window[width - 1] = slice(right, right + images.shape[width])
        result[number] = padded[number][tuple(window)]
    return result
