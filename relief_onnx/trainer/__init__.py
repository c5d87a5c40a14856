"""Training under masks, in torch: what is zero stays zero. `open_loop()` is the door; before it nothing here needs torch."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from relief_onnx.errors import RecipeError

__all__ = ["open_loop"]


def open_loop() -> ModuleType:
    """The module `loop`. Raises RecipeError where torch is not installed."""
    if find_spec("torch") is None:
        raise RecipeError(
            "retraining needs torch, which is not installed; run: pip install relief-onnx[retrain], or use --repair least-squares"
        )
    from relief_onnx.trainer import loop

    return loop
