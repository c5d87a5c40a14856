"""Speech-like sound for the flow benchmark, synthesised: nothing recorded is at hand without a network.

Harmonics of a wandering pitch under moving formants (vowels), shaped noise (fricatives), pauses, and background noise at 0 to 20 dB;
one new voice for every utterance. The frames that DTLN's second stage sees are made as its own code makes them: frames of
512 samples, 128 apart at 16 kHz, cleaned by the first stage, each with the state that the original second stage had there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.flow_models import path, zoo_file

RATE, FRAME, SHIFT = 16_000, 512, 128
EVERY = 4  # of neighbouring frames, which share three quarters of their samples, one is kept

Sound = NDArray[np.float64]

# First three formants in Hz of ten vowels, the usual textbook values for a man; a voice scales them.
_VOWELS = np.array(
    [
        [270, 2290, 3010], [390, 1990, 2550], [530, 1840, 2480], [660, 1720, 2410], [730, 1090, 2440],
        [570, 840, 2410], [440, 1020, 2240], [300, 870, 2240], [640, 1190, 2390], [490, 1350, 1690],
    ],
    float,
)  # fmt: skip


def _contour(points: Sound, count: int) -> Sound:
    """Straight lines through equally spaced points, `count` samples."""
    return np.interp(np.linspace(0, len(points) - 1, count), np.arange(len(points)), points)


def _voiced(rng: np.random.Generator, count: int, pitch: float, scale: float) -> Sound:
    """Two to four vowels that run into each other."""
    vowels = _VOWELS[rng.integers(0, len(_VOWELS), rng.integers(2, 5))] * scale
    f0 = _contour(pitch * rng.uniform(0.85, 1.2, 4), count)
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    formants = [(_contour(vowels[:, i], count), width) for i, width in enumerate((60.0, 90.0, 150.0))]
    sound = np.zeros(count)
    for harmonic in range(1, int(4500 / pitch) + 1):
        f = harmonic * f0
        loud = sum(1 / (1 + ((f - center) / width) ** 2) / (1 + i) for i, (center, width) in enumerate(formants))
        sound += loud / harmonic**0.5 * np.sin(harmonic * phase)
    return sound * np.hanning(count) ** 0.3


def _noise(rng: np.random.Generator, count: int, low: float, high: float) -> Sound:
    """White noise between two frequencies."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    f = np.fft.rfftfreq(count, 1 / RATE)
    shaped = np.fft.irfft(spectrum * (f > low) * (f < high), count)
    return shaped * np.hanning(count) ** 0.5


def _utterance(rng: np.random.Generator, seconds: float) -> Sound:
    """Syllables and pauses of one voice with background noise, peak about 0.5."""
    pitch, scale = rng.uniform(90, 230), rng.uniform(0.95, 1.2)
    sound = np.zeros(int(seconds * RATE))
    at = 0
    while at < len(sound):
        kind = rng.random()
        part = np.zeros(int(rng.uniform(0.05, 0.3) * RATE))
        if kind < 0.65:
            part = _voiced(rng, len(part), pitch, scale)
        elif kind < 0.85:
            low = rng.uniform(1500, 4000)
            part = 0.5 * _noise(rng, len(part) // 2, low, low + 3500)
        part *= rng.uniform(0.4, 1)
        end = min(len(sound), at + len(part))
        sound[at:end] += part[: end - at]
        at += len(part)
    level = np.sqrt((sound**2).mean())
    colour = np.fft.rfft(rng.standard_normal(len(sound)))
    colour[1:] /= np.fft.rfftfreq(len(sound))[1:] ** rng.uniform(0, 0.8)
    background = np.fft.irfft(colour, len(sound))
    sound += background / background.std() * level * 10 ** (-rng.uniform(0, 20) / 20)
    return np.asarray(0.5 * sound / np.abs(sound).max())


def dtln_2(seed: int, count: int) -> dict[str, NDArray[Any]]:
    """`count` frames [n, 1, 512] and states [n, 2, 128, 2] for DTLN's second stage, out of as many utterances as that takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    first, second = (
        onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
        for file in (zoo_file("dtln_1"), path("dtln_2"))
    )
    rng = np.random.default_rng(seed)
    frames: list[NDArray[np.float32]] = []
    states: list[NDArray[np.float32]] = []
    while len(frames) < count:
        sound = _utterance(rng, 2.0)
        mask_state = state = np.zeros((1, 2, 128, 2), np.float32)
        for number, start in enumerate(range(0, len(sound) - FRAME, SHIFT)):
            spectrum = np.fft.rfft(sound[start : start + FRAME])
            mask, mask_state = first.run(None, {"input_2": np.abs(spectrum)[None, None].astype(np.float32), "input_3": mask_state})
            frame = np.fft.irfft(spectrum * mask[0, 0])[None, None].astype(np.float32)
            if number % EVERY == EVERY - 1:
                frames.append(frame)
                states.append(state)
            _, state = second.run(None, {"input_4": frame, "input_5": state})
    return {"input_4": np.concatenate(frames[:count]), "input_5": np.concatenate(states[:count])}
