"""Samples for each real model of ../shared/models: what it was made for where that can be had without a network, else random numbers.

Images, text and text lines are those of the flow benchmark, sound is synthesised (flow_sound) and cut into frames as each model's own
code does, with the state that the original model had there; files on this machine feed the file type classifier.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import flow_data
from benchmarks.flow_inputs import lines, scenes
from benchmarks.flow_sound import FRAME, RATE, SHIFT, _utterance
from benchmarks.zoo_models import ZOO, feed
from benchmarks.zoo_text import mixed_passages

__all__ = ["samples"]

Feed = dict[str, NDArray[Any]]
SEEDS = {"calib_a": 21, "calib_b": 22, "test": 23}
EVERY = 4  # of neighbouring frames, which are much alike, one is kept


def samples(row: Mapping[str, Any], split: str, count: int, folder: Path = ZOO) -> tuple[list[Feed], str]:
    """At most `count` feeds of one sample each of the split `calib_a` or `test`, and what they are."""
    name = str(row["id"])
    for what, (names, make) in _MADE.items():
        if name in names:
            return make(name, split, count, folder), what
    return [feed(dict(row), (0 if split == "calib_a" else 1000) + index) for index in range(count)], "random"


def _stored(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    short = {"resnet20_cifar10_bn": "resnet20", "resnet20_cifar10_folded": "resnet20"}
    short |= {"resnet56_cifar10_bn": "resnet56", "resnet56_cifar10_folded": "resnet56"}
    return flow_data.calibration(short.get(name, name), split, 1, count)


def _text(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    ids = mixed_passages(split, count)
    ones = np.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": ones} | ({"token_type_ids": 0 * ones} if name == "minilm_l6_int8" else {})
    return [{key: value[i : i + 1] for key, value in given.items()} for i in range(len(ids))]


# Per model: the side in pixels, what to subtract and divide by, whether channels come last, the input's name.
_IMAGES = {
    "mesonet": (256, 0.0, 255.0, True, "input"),
    "ultraface_rfb320": (320, 127.0, 128.0, False, "input"),
    "qonnx_espcn_float": (64, 0.0, 255.0, False, "input"),
}


def _images(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    side, shift, scale, last, key = _IMAGES[name]
    found = []
    for picture in scenes(split, count, side, SEEDS[split]):
        if name == "ultraface_rfb320":
            picture = picture[40:280]
        if name == "qonnx_espcn_float":  # it takes patches of 4x4
            picture = picture[30:34, 30:34]
        pixels = ((picture.astype(np.float32) - shift) / scale).astype(np.float32)
        found.append({key: np.ascontiguousarray(pixels if last else pixels.transpose(2, 0, 1))[None]})
    return found


def _pages(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    """Six text lines of 48 x 320 below each other, the rest empty."""
    pixels, _ = lines(split, 6 * count, 320, False, SEEDS[split])
    pages = np.full((count, 320, 320, 3), 255, np.float32)
    pages[:, :288] = pixels.reshape(count, 6 * 48, 320, 3)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return [{"x": ((page / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)} for page in pages]


def _session(name: str, folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])


def _running(
    name: str, folder: Path, split: str, count: int, state: Feed, frames: Callable[[NDArray[np.float64]], Iterator[Feed]],
) -> list[Feed]:  # fmt: skip
    """Frames of as many utterances as it takes, each with the state that the original had. Outputs after the first are its new state."""
    session, rng, found = _session(name, folder), np.random.default_rng(SEEDS[split]), list[Feed]()
    while len(found) < count:
        now = dict(state)
        for number, frame in enumerate(frames(_utterance(rng, 2.0))):
            whole = {**frame, **now}
            if number % EVERY == EVERY - 1:
                found.append(whole)
            now = dict(zip(state, session.run(None, whole)[1:], strict=True))
    return found[:count]


def _dtln(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    def frames(sound: NDArray[np.float64]) -> Iterator[Feed]:
        for start in range(0, len(sound) - FRAME, SHIFT):
            yield {"input_2": np.abs(np.fft.rfft(sound[start : start + FRAME]))[None, None].astype(np.float32)}

    return _running(name, folder, split, count, {"input_3": np.zeros((1, 2, 128, 2), np.float32)}, frames)


def _gtcrn(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    window = np.sqrt(np.hanning(FRAME + 1)[:-1])

    def frames(sound: NDArray[np.float64]) -> Iterator[Feed]:
        for start in range(0, len(sound) - FRAME, FRAME // 2):
            spectrum = np.fft.rfft(window * sound[start : start + FRAME])
            yield {"mix": np.stack([spectrum.real, spectrum.imag], -1)[None, :, None].astype(np.float32)}

    state = {"conv_cache": (2, 1, 16, 16, 33), "tra_cache": (2, 3, 1, 1, 16), "inter_cache": (2, 1, 33, 16)}
    return _running(name, folder, split, count, {key: np.zeros(shape, np.float32) for key, shape in state.items()}, frames)


def _silero(name: str, split: str, count: int, folder: Path, steps: tuple[int, ...] = (1,)) -> list[Feed]:
    """steps: how much slower than RATE the utterances are sampled, in turns."""
    turns = cycle(steps)

    def frames(sound: NDArray[np.float64]) -> Iterator[Feed]:
        step = next(turns)
        slow, chunk, rate = sound[: len(sound) // step * step].reshape(-1, step).mean(1), 512 // step, np.array(RATE // step, np.int64)
        for start in range(chunk // 8, len(slow) - chunk, chunk):
            yield {"input": slow[start - chunk // 8 : start + chunk][None].astype(np.float32), "sr": rate}

    return _running(name, folder, split, count, {"state": np.zeros((2, 1, 128), np.float32)}, frames)


def _pitch(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    rng = np.random.default_rng(SEEDS[split])
    return [
        {"serving_default_input_2:0": _utterance(rng, 43844 / RATE)[:43844].reshape(1, 43844, 1).astype(np.float32)} for _ in range(count)
    ]


def _files(name: str, split: str, count: int, folder: Path) -> list[Feed]:
    """The first and the last 1,024 bytes of files of Python's library and of packages, 256 where a file is shorter."""
    root = Path(sysconfig.get_paths()["purelib"])
    listed = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size > 64)
    by_kind: dict[str, list[Path]] = {}
    for path in listed:
        by_kind.setdefault(path.suffix, []).append(path)
    rng = np.random.default_rng(0)
    order = [str(kind) for kind in rng.permutation(sorted(by_kind))]
    chosen = [path for turn in range(40) for kind in order for path in by_kind[kind][turn : turn + 1]]
    found = []
    for path in chosen[0 if split == "calib_a" else 1 :: 2][:count]:
        content = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32)
        values = np.full(2048, 256, np.int32)
        head, tail = content[:1024], content[-1024:]
        values[: len(head)] = head
        values[2048 - len(tail) :] = tail
        found.append({"bytes": values[None]})
    return found


_MADE: Mapping[str, tuple[frozenset[str], Callable[[str, str, int, Path], list[Feed]]]] = {
    "images": (
        frozenset({
            "resnet20_cifar10_bn", "resnet20_cifar10_folded", "resnet56_cifar10_bn", "resnet56_cifar10_folded", "nudenet_320n", "yunet_n",
            "vit_s_focus", "ppocr_cls", "ppocrv4_rec",
        }),
        _stored,
    ),
    "pictures": (frozenset(_IMAGES), _images),
    "pages": (frozenset({"ppocrv4_det"}), _pages),
    "sentences": (frozenset({"minilm_l3", "minilm_l6_int8"}), _text),
    "frames": (frozenset({"dtln_2"}), _stored),
    "speech": (frozenset({"dtln_1"}), _dtln),
    "speech, streaming": (frozenset({"gtcrn"}), _gtcrn),
    "speech, chunks": (frozenset({"silero_vad_16k_op15"}), _silero),
    "speech, both rates": (frozenset({"silero_vad_v6", "silero_vad_op18_ifless"}), partial(_silero, steps=(1, 2))),
    "sound": (frozenset({"basic_pitch"}), _pitch),
    "files": (frozenset({"magika_v3_3"}), _files),
}  # fmt: skip
