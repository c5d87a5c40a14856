"""Speech models that carry states from frame to frame, at half of their weights, without training: `make bench-speech`.

    python -m benchmarks.speech [--models dtln_1,gtcrn] [--keep 50%] [--samples 384]

Sound is synthesised (`flow_sound`): other voices to calibrate than to judge. The cosine is that of the model's sound output over
all frames: `frame` where every frame starts from the original's states, `stream` where the pruned model goes on from its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

import relief_onnx
from benchmarks.flow_models import zoo_file
from benchmarks.flow_sound import FRAME, SHIFT, Sound, _utterance
from benchmarks.zoo_models import ROOT
from relief_onnx.session import Session

Array = NDArray[Any]
Feed = dict[str, Array]

CALIBRATE, JUDGE, UTTERANCES, SECONDS = 1, 7000, 4, 2.0  # seeds and what is judged on
EVERY = 4  # of the frames to calibrate with one in so many

# Ways to prune, by name: keywords of `relief_onnx.prune`.
WAYS: Mapping[str, dict[str, Any]] = {
    "flow": {"criterion": "flow"},
    "flow, repaired": {"criterion": "flow", "repair": "least-squares"},
    "flow-obs, repaired": {"repair": "least-squares"},
    "wanda": {"criterion": "wanda"},
    "magnitude": {"criterion": "magnitude"},
}


@dataclass(frozen=True)
class Speech:
    """How a model hears: its inputs for a piece of sound, the names of states in and out, and the output that is judged."""

    hear: Callable[[Sound], Iterator[Array]]
    sound: str
    states: Mapping[str, tuple[str, tuple[int, ...]]]
    output: str
    skip: str | None = None


def _magnitudes(sound: Sound) -> Iterator[Array]:
    for start in range(0, len(sound) - FRAME, SHIFT):
        yield np.abs(np.fft.rfft(sound[start : start + FRAME]))[None, None].astype(np.float32)


def _cleaned(sound: Sound) -> Iterator[Array]:
    """Frames as DTLN's first stage leaves them."""
    first = stream(onnx.load(zoo_file("dtln_1")), MODELS["dtln_1"], sound)
    for start, (_, outputs) in zip(range(0, len(sound) - FRAME, SHIFT), first, strict=True):
        spectrum = np.fft.rfft(sound[start : start + FRAME]) * outputs[0][0, 0]
        yield np.fft.irfft(spectrum)[None, None].astype(np.float32)


def _spectra(sound: Sound) -> Iterator[Array]:
    window = np.hanning(FRAME + 1)[:FRAME] ** 0.5
    for start in range(0, len(sound) - FRAME, FRAME // 2):
        f = np.fft.rfft(sound[start : start + FRAME] * window)
        yield np.stack([f.real, f.imag], -1)[None, :, None].astype(np.float32)


MODELS: Mapping[str, Speech] = {
    "dtln_1": Speech(_magnitudes, "input_2", {"input_3": ("tf_op_layer_stack_2", (1, 2, 128, 2))}, "activation_2"),
    "dtln_2": Speech(_cleaned, "input_4", {"input_5": ("tf_op_layer_stack_5", (1, 2, 128, 2))}, "conv1d_3"),
    "gtcrn": Speech(
        _spectra, "mix",
        {
            "conv_cache": ("conv_cache_out", (2, 1, 16, 16, 33)), "tra_cache": ("tra_cache_out", (2, 3, 1, 1, 16)),
            "inter_cache": ("inter_cache_out", (2, 1, 33, 16)),
        },
        "enh",
        # Fixed filter banks, nearly all of them zeros: half of all weights would be these zeros.
        skip="^onnx::MatMul_(3932|3414)$",
    ),
}  # fmt: skip


def stream(model: onnx.ModelProto, kind: Speech, sound: Sound) -> Iterator[tuple[Feed, list[Array]]]:
    """Every frame's inputs and outputs (the judged one, then states), each frame from the states of the one before."""
    session = Session(model, 1)
    states = {name: np.zeros(shape, np.float32) for name, (_, shape) in kind.states.items()}
    names = [kind.output, *(name for name, _ in kind.states.values())]
    for frame in kind.hear(sound):
        feed = {kind.sound: frame, **states}
        outputs = session.run(feed, names)
        yield feed, outputs
        states = dict(zip(states, outputs[1:], strict=True))


def frames(model: onnx.ModelProto, kind: Speech, count: int, seed: int = CALIBRATE) -> list[Feed]:
    """Some frames with the states that the model had there, out of as many utterances as that takes."""
    rng, found = np.random.default_rng(seed), list[Feed]()
    while len(found) < count:
        run = [feed for feed, _ in stream(model, kind, _utterance(rng, SECONDS))]
        found += run[EVERY - 1 :: EVERY]
    return found[:count]


def judge(original: onnx.ModelProto, pruned: onnx.ModelProto, kind: Speech) -> dict[str, float]:
    """Cosines over all frames of utterances that were not calibrated with."""
    rng, session = np.random.default_rng(JUDGE), Session(pruned, 1)
    runs: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    for _ in range(UTTERANCES):
        sound = _utterance(rng, SECONDS)
        for feed, outputs in stream(original, kind, sound):
            runs[0].append(outputs[0])
            runs[1].append(session.run(feed, [kind.output])[0])
        runs[2].extend(outputs[0] for _, outputs in stream(pruned, kind, sound))
    wanted, frame, own = (np.stack(run).astype(np.float64).ravel() for run in runs)
    return {name: float(wanted @ x / np.sqrt((wanted @ wanted) * (x @ x))) for name, x in (("frame", frame), ("stream", own))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--keep", default="50%")
    parser.add_argument("--samples", type=int, default=384)
    options = parser.parse_args()
    target = ROOT / "benchmarks" / "results" / "speech.json"
    rows: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for name in options.models.split(","):
        kind, original = MODELS[name], onnx.load(zoo_file(name))
        data = frames(original, kind, options.samples)
        for way, given in WAYS.items():
            found = relief_onnx.prune(original, data, keep=options.keep, granularity="weight", threads=1, skip=kind.skip, **given)
            row = {key: round(value, 4) for key, value in judge(original, found.model, kind).items()}
            kept = found.report["totals"]["kept_percent"]
            rows.setdefault(name, {}).setdefault(options.keep, {})[way] = row | {"kept_of_all": round(kept, 2), "samples": options.samples}
            target.write_text(json.dumps(rows, indent=2) + "\n")
            print(f"{name:8} {options.keep:>5} {way:20} {row}", flush=True)


if __name__ == "__main__":
    main()
