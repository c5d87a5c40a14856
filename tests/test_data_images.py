"""Images through the data door: modes, sizes, colours, layouts, options and labels.csv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import F16, GRAY, RGB, U8, color_pixels, labels, read_all, save_image, spec
from PIL import Image

from relief_onnx.data import ImageOptions, InputSpec, open_dataset
from relief_onnx.errors import DataError, RecipeError


def test_rgb_values_and_order(tmp_path: Path) -> None:
    pixels = color_pixels()
    save_image(tmp_path / "a.png", pixels)
    chw = pixels.transpose(2, 0, 1)[None]
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    m, s = np.reshape(mean, (1, 3, 1, 1)), np.reshape(std, (1, 3, 1, 1))
    cases: list[tuple[InputSpec, dict[str, Any], np.ndarray]] = [
        (RGB, {}, chw / 255),
        (RGB, {"color": "bgr"}, chw[:, ::-1] / 255),
        (RGB, {"scale": 1.0}, chw),
        (RGB, {"mean": mean, "std": std}, (chw / 255 - m) / s),
        (RGB, {"mean": mean, "std": std, "color": "bgr"}, (chw[:, ::-1] / 255 - m) / s),
        (RGB, {"mean": (0.5,), "std": (0.5,)}, (chw / 255 - 0.5) / 0.5),
        (spec("N", 4, 6, 3), {}, pixels[None] / 255),
        (spec("N", 4, 6, 3), {"color": "bgr"}, pixels[None, :, :, ::-1] / 255),
        (spec("N", "C", "H", "W"), {"layout": "nchw"}, chw / 255),
        (spec("N", "H", "W", "C"), {"layout": "nhwc"}, pixels[None] / 255),
        (spec("N", 3, 4, 6, dtype=U8), {}, chw),
        (spec("N", 3, 4, 6, dtype=np.dtype(np.int8)), {"mean": (128.0,)}, chw.astype(int) - 128),
        (spec("N", 3, 4, 6, dtype=F16), {}, chw / 255),
    ]
    for target, options, expected in cases:
        (batch,) = read_all(tmp_path, target, **options)
        assert batch.feed["x"].dtype == target.dtype
        tolerance = 1e-3 if target.dtype == F16 else 2e-6
        np.testing.assert_allclose(batch.feed["x"].astype(np.float64), expected, rtol=tolerance, atol=tolerance, err_msg=str(options))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "LA", "CMYK"])
def test_every_png_and_tif_mode_reads_as_its_rgb(tmp_path: Path, mode: str) -> None:
    path = save_image(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), color_pixels(), mode)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        gray = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_all(path, spec("N", 3, 4, 6, dtype=U8))[0].feed["x"][0], expected)
    if mode in ("L", "LA", "1"):
        np.testing.assert_array_equal(read_all(path, spec("N", 1, 4, 6, dtype=U8))[0].feed["x"][0, 0], gray)


def test_a_palette_with_transparency_reads_without_a_warning(tmp_path: Path) -> None:
    image = Image.fromarray(color_pixels()).quantize(4)
    image.save(tmp_path / "a.png", transparency=b"\x00\x80\xff\xff")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(read_all(tmp_path, spec("N", 3, 4, 6, dtype=U8))[0].feed["x"][0], expected)


def test_sixteen_bits_keep_their_precision(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 24).reshape(4, 6).astype(np.uint16)
    save_image(tmp_path / "a.png", deep)
    gray = read_all(tmp_path, GRAY)[0].feed["x"][0, 0]
    np.testing.assert_allclose(gray, deep / 65535, rtol=1e-6)
    np.testing.assert_array_equal(read_all(tmp_path, RGB)[0].feed["x"][0, 2], gray)
    whole = read_all(tmp_path, spec("N", 1, 4, 6, dtype=U8))[0].feed["x"][0, 0]
    np.testing.assert_array_equal(whole, np.rint(deep / 257))


def test_color_to_gray_and_gray_to_color(tmp_path: Path) -> None:
    pixels = color_pixels()
    path = save_image(tmp_path / "a.png", pixels)
    expected = pixels @ np.array([0.299, 0.587, 0.114]) / 255
    np.testing.assert_allclose(read_all(path, GRAY)[0].feed["x"][0, 0], expected, atol=0.5 / 255 + 1e-6)
    dynamic = read_all(path, spec("N", "C", "H", "W"), layout="nchw", color="gray")[0].feed["x"]
    assert dynamic.shape == (1, 1, 4, 6)


def test_resizing_is_antialiased_bilinear(tmp_path: Path) -> None:
    checker = np.indices((64, 64)).sum(0) % 2 * 255
    save_image(tmp_path / "a.png", checker.astype(np.uint8))
    small = read_all(tmp_path, spec("N", 1, 4, 6))[0].feed["x"]
    assert small.shape == (1, 1, 4, 6)
    np.testing.assert_allclose(small, 0.5, atol=0.5 / 255 + 1e-6)  # without antialiasing it would alias to 0 and 1
    one_free = read_all(tmp_path, spec("N", 1, 8, "W"))[0].feed["x"]
    assert one_free.shape == (1, 1, 8, 64)


def test_images_of_several_sizes_batch_by_size(tmp_path: Path) -> None:
    for index, size in enumerate(((4, 4), (4, 4), (5, 4))):
        save_image(tmp_path / f"{index}.png", np.zeros(size, np.uint8))
    data = open_dataset(tmp_path, [spec("N", 1, "H", "W")])
    assert [batch.feed["x"].shape for batch in data.batches(8)] == [(2, 1, 4, 4), (1, 1, 5, 4)]


@pytest.mark.parametrize("suffix", ["png", "JPG", "jpeg", "bmp", "webp", "gif", "tif", "tiff"])
def test_image_suffixes(tmp_path: Path, suffix: str) -> None:
    save_image(tmp_path / f"a.{suffix}", np.full((4, 6, 3), 200, np.uint8))
    np.testing.assert_allclose(read_all(tmp_path, RGB)[0].feed["x"], 200 / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "expected", "names"),
    [
        ("file,label\na.png,1\nb.png,0\n", [1, 0], ()),
        ("b.png,0\na.png,2\n", [2, 0], ()),
        ("a.png,dog\nb.png,cat\n", [1, 0], ("cat", "dog")),
        ("image;class\nb.png;x\na.png;y\n", [1, 0], ("x", "y")),
    ],
)
def test_labels_csv(tmp_path: Path, table: str, expected: list[int], names: tuple[str, ...]) -> None:
    for name in ("a.png", "b.png"):
        save_image(tmp_path / name, color_pixels())
    (tmp_path / "labels.csv").write_text(table)
    data = open_dataset(tmp_path, [RGB])
    assert (labels(data), data.class_names, data.kind, data.files) == (
        expected,
        names,
        "images",
        ("a.png", "b.png", "labels.csv"),
    )


def test_labels_csv_may_name_files_in_sub_folders(tmp_path: Path) -> None:
    for name in ("one/a.png", "two/a.png"):
        save_image(tmp_path / name, color_pixels())
    (tmp_path / "labels.csv").write_text("two/a.png,0\none/a.png,1\n")
    assert labels(open_dataset(tmp_path, [RGB])) == [1, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layout": "hwc"}, "image layout 'hwc' is unknown; use one of auto, nchw, nhwc"),
        ({"color": "red"}, "image color 'red' is unknown"),
        ({"std": (0.0,)}, "scale or std is 0"),
        ({"scale": 0.0}, "scale or std is 0"),
        ({"mean": (float("nan"),)}, "not a list of finite numbers"),
        ({"mean": ()}, "not a list of finite numbers"),
    ],
)
def test_image_options_that_mean_nothing(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(sentence)):
        ImageOptions(**options)


@pytest.mark.parametrize(
    ("target", "options", "error", "sentence"),
    [
        (spec("N", 3), {}, DataError, "Images need a numeric model input with 4 axes"),
        (spec("N", 5, 4, 6), {}, DataError, "cannot be told from its shape; give the image layout nchw or nhwc"),
        (spec("N", 3, 4, 3), {}, DataError, "cannot be told from its shape"),
        (spec("N", 4, 6, 6), {"layout": "nchw"}, DataError, "do not give the 4 channels of the model's input 'x'"),
        (GRAY, {"color": "bgr"}, DataError, "Images as 'bgr' do not give the 1 channels"),
        (
            RGB,
            {"mean": (1.0, 2.0)},
            RecipeError,
            "The image mean has 2 values, but the model's input 'x' (float32 [N, 3, 4, 6]) has 3",
        ),
        (
            spec("N", 3, 4, 6, dtype=U8),
            {"scale": 1 / 255},
            DataError,
            "gets fractions from the image scale, mean or std",
        ),
        (spec("N", 3, 4, 6, dtype=np.dtype(np.int8)), {}, DataError, "needs whole numbers that int8 holds exactly"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, target: InputSpec, options: Any, error: type, sentence: str) -> None:
    save_image(tmp_path / "a.png", np.full((4, 6, 3), 201, np.uint8))
    with pytest.raises(error, match=re.escape(sentence)):
        read_all(tmp_path, target, **options)
