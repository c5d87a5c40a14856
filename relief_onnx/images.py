"""Image files as samples: decode, resize to the model's size, order the channels, normalise.

Alpha is dropped and palettes are resolved, as the usual training loaders do; only the first frame of an animation is
read; the orientation tag is ignored. 16-bit grey keeps its precision and is brought to 0..255 before `scale`.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from relief_onnx.data_checks import Array, family, spec_text
from relief_onnx.datatypes import InputSpec
from relief_onnx.errors import DataError, OptionError, RecipeError

__all__ = ["ImageOptions", "ImagePlan", "decode_image", "plan_images"]

Layout = Literal["auto", "nchw", "nhwc"]
Color = Literal["rgb", "bgr", "gray", "auto"]

_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_GRAY_16 = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class ImageOptions:
    """How pixels become values: (pixel * scale - mean) / std.

    mean, std: one value, or one per channel in the model's channel order; in units after `scale`.
    scale: None means 1/255 for a float input and no scaling for an integer one.
    layout: where the channels sit; auto looks which axis of the model's input is 1 or 3.
    color: auto is rgb for 3 channels and gray for 1.

    Raises OptionError for a value that means nothing.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    layout: Layout = "auto"
    color: Color = "auto"

    def __post_init__(self) -> None:
        for name, known in (("layout", ("auto", "nchw", "nhwc")), ("color", ("auto", "rgb", "bgr", "gray"))):
            if getattr(self, name) not in known:
                raise OptionError(f"The image {name} '{getattr(self, name)}' is unknown; use one of {', '.join(known)}.")
        for name, values in (
            ("mean", self.mean),
            ("std", self.std),
            ("scale", None if self.scale is None else (self.scale,)),
        ):
            if values is not None and (not values or not all(math.isfinite(value) for value in values)):
                raise OptionError(f"The image {name} {values} is not a list of finite numbers; give one value, or one per channel.")
        if self.scale == 0 or (self.std is not None and 0 in self.std):
            raise OptionError("The image scale or std is 0, which would wipe out or blow up every pixel; give another value.")


class ImagePlan(NamedTuple):
    """The options resolved for one model input."""

    spec: InputSpec
    nhwc: bool
    channels: int
    bgr: bool
    size: tuple[int | None, int | None]  # H, W; None keeps the image's own
    options: ImageOptions


def plan_images(spec: InputSpec, options: ImageOptions) -> ImagePlan:
    """Resolve layout, colour and size from the model's input. Raises DataError or RecipeError where they do not fit."""
    if len(spec.shape) != 4 or family(spec.dtype) not in ("float", "int"):
        raise DataError(
            "Images need a numeric model input with 4 axes (N, C, H, W or N, H, W, C), but the model has "
            f"{spec_text(spec)}; "
            "convert the images to .npy or .npz files of the model's shape."
        )
    nhwc = _is_nhwc(spec, options)
    _, *rest = spec.shape
    channel_axis, height, width = (rest[2], rest[0], rest[1]) if nhwc else (rest[0], rest[1], rest[2])
    channels = channel_axis if isinstance(channel_axis, int) else (1 if options.color == "gray" else 3)
    wanted = {"gray": 1, "rgb": 3, "bgr": 3}.get(options.color, channels)
    if channels not in (1, 3) or wanted != channels:
        raise DataError(
            f"Images as '{options.color}' do not give the {channels} channels of the model's input {spec_text(spec)}; "
            "choose another color or layout, or convert the images to .npy files."
        )
    for name, values in (("mean", options.mean), ("std", options.std)):
        if values is not None and len(values) not in (1, channels):
            raise RecipeError(
                f"The image {name} has {len(values)} values, but the model's input {spec_text(spec)} has {channels} "
                "channels; "
                "give one value, or one per channel."
            )
    size = (height if isinstance(height, int) else None, width if isinstance(width, int) else None)
    return ImagePlan(spec, nhwc, channels, options.color == "bgr", size, options)


def _is_nhwc(spec: InputSpec, options: ImageOptions) -> bool:
    if options.layout != "auto":
        return options.layout == "nhwc"
    first, last = spec.shape[1] in (1, 3), spec.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"The channel axis of the model's input {spec_text(spec)} cannot be told from its shape; give the image layout nchw or nhwc."
        )
    return last


def decode_image(path: Path, plan: ImagePlan) -> Array:
    """One image as [1, C, H, W] or [1, H, W, C] values, not yet in the input's dtype.

    Raises DataError for an unreadable file, or where an integer input would get fractions.
    """
    source = f"'{path}'"
    try:
        # Pillow warns about odd metadata and large sizes; the pixels are what counts, and a library must not print.
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            pixels = _pixels(image, plan, source)
    except _UNREADABLE as error:
        raise DataError(
            f"{source} cannot be read as an image ({str(error) or type(error).__name__}); replace or remove the file."
        ) from error
    values = _normalise(pixels, plan, source)
    if plan.bgr:
        values = values[..., ::-1]
    sample: Array = values if plan.nhwc else values.transpose(2, 0, 1)
    return sample[None]


def _pixels(image: Image.Image, plan: ImagePlan, source: str) -> Array:
    """[H, W, C] in 0..255, in r, g, b order: uint8, or float32 where the file has 16 bits."""
    image = _simple(image, plan.channels, source)
    height = plan.size[0] or image.height
    width = plan.size[1] or image.width
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels: Array = np.asarray(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], plan.channels, axis=2)
    return pixels


def _simple(image: Image.Image, channels: int, source: str) -> Image.Image:
    """The image in mode L, RGB, or F in 0..255."""
    if image.mode in _GRAY_16 or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(np.asarray(image).astype(np.float32) / 257)
    if image.mode in ("I", "F"):
        raise DataError(f"{source} has 32-bit pixels, whose range is unknown; convert it to 8 or 16 bits, or save it as .npy.")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("L" if channels == 1 else "RGB")


def _normalise(pixels: Array, plan: ImagePlan, source: str) -> Array:
    options = plan.options
    whole = family(plan.spec.dtype) == "int"
    plain = options.scale is None and options.mean is None and options.std is None
    if whole and plain:
        return np.rint(pixels).astype(np.int64)
    scale = options.scale if options.scale is not None else (1.0 if whole else 1 / 255)
    values: Array = pixels * np.float32(scale)
    # mean and std are in the model's channel order, the pixels still in r, g, b.
    step = -1 if plan.bgr else 1
    if options.mean is not None:
        values = values - np.asarray(options.mean[::step], np.float32)
    if options.std is not None:
        values = values / np.asarray(options.std[::step], np.float32)
    if not whole:
        return values
    if not np.array_equal(values, np.rint(values)):
        raise DataError(
            f"{source} gets fractions from the image scale, mean or std, but the model's input "
            f"{spec_text(plan.spec)} needs whole numbers; "
            "leave these options out."
        )
    return values.astype(np.int64)
