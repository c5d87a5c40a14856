"""relief-onnx: make trained ONNX models smaller, measured and verified in onnxruntime.

    import relief_onnx
    result = relief_onnx.prune("model.onnx", "calib/", alpha=0.95, output="model.pruned.onnx")
    print(result.report["totals"]["kept_percent"])

Nothing heavy is imported until it is used; torch only by retraining.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relief_onnx.compare import Comparison, compare_models
    from relief_onnx.data import ImageOptions, open_dataset
    from relief_onnx.errors import (
        DataError,
        ModelError,
        NothingPrunedError,
        NothingQuantizedError,
        OptionError,
        OutputError,
        RecipeError,
        ReliefError,
        VerificationError,
    )
    from relief_onnx.options import Options
    from relief_onnx.pipeline import Result, prune, score
    from relief_onnx.prepared import prepare
    from relief_onnx.quantization import Quantized, quantize
    from relief_onnx.retraining import Retrained, retrain

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "compare",
    "DataError": "errors",
    "ImageOptions": "data",
    "ModelError": "errors",
    "NothingPrunedError": "errors",
    "NothingQuantizedError": "errors",
    "OptionError": "errors",
    "Options": "options",
    "OutputError": "errors",
    "RecipeError": "errors",
    "ReliefError": "errors",
    "Quantized": "quantization",
    "Result": "pipeline",
    "Retrained": "retraining",
    "VerificationError": "errors",
    "compare_models": "compare",
    "open_dataset": "data",
    "prepare": "prepared",
    "prune": "pipeline",
    "quantize": "quantization",
    "retrain": "retraining",
    "score": "pipeline",
}

__all__ = [
    "Comparison",
    "DataError",
    "ImageOptions",
    "ModelError",
    "NothingPrunedError",
    "NothingQuantizedError",
    "OptionError",
    "Options",
    "OutputError",
    "Quantized",
    "RecipeError",
    "ReliefError",
    "Result",
    "Retrained",
    "VerificationError",
    "compare_models",
    "open_dataset",
    "prepare",
    "prune",
    "quantize",
    "retrain",
    "score",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"relief_onnx.{_HOMES[name]}"), name)
    raise AttributeError(f"module relief_onnx has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
