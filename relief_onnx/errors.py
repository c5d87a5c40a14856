"""The errors that relief-onnx raises on purpose. Each message is one sentence that names the file or node and the fix.

ReliefError                    exit code 1
├── ModelError                 the model file: missing, truncated, not ONNX, external data, unknown domain
│   └── Unsupported            a node that the torch interpreter cannot run
├── DataError                  the calibration data: missing, empty, wrong name, type or shape, NaN, unreadable
├── RecipeError                a recipe, or an option that does not fit the model, the data or the machine
│   └── OptionError            exit code 2: an option's value is out of range, or options contradict each other
├── OutputError                the place to write to: exists, not writable, disk full
├── VerificationError          exit code 3: the result did not verify, nothing was written
└── NothingPrunedError         exit code 4: nothing could be pruned; carries the reasons
    └── NothingQuantizedError  exit code 4: nothing could be quantised, or it is already
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "DataError",
    "ModelError",
    "NothingPrunedError",
    "NothingQuantizedError",
    "OptionError",
    "OutputError",
    "RecipeError",
    "ReliefError",
    "Unsupported",
    "VerificationError",
]


class ReliefError(Exception):
    """Base of every error that relief-onnx raises on purpose."""

    exit_code = 1


class ModelError(ReliefError):
    """The model cannot be read or run."""


class Unsupported(ModelError):  # noqa: N818 - a refusal, not a fault
    """A node that the torch interpreter cannot run."""


class DataError(ReliefError):
    """The calibration data cannot be read or does not fit the model."""


class RecipeError(ReliefError):
    """A recipe, a preset or an option has a value that means nothing here."""


class OptionError(RecipeError):
    """An option has a value that means nothing anywhere, or contradicts another one; no recipe file has a part in it."""

    exit_code = 2


class OutputError(ReliefError):
    """The result cannot be written where the user wants it."""


class VerificationError(ReliefError):
    """The result does not compute what the masked model computes; nothing was written."""

    exit_code = 3


class NothingPrunedError(ReliefError):
    """Nothing could be pruned. `reasons` maps a weight's name to why it was left alone."""

    exit_code = 4

    def __init__(self, message: str, reasons: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


class NothingQuantizedError(NothingPrunedError):
    """Nothing could be quantised, or the model is quantised already. `reasons` as above."""
