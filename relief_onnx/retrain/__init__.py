"""Training under masks, in torch: what is zero stays zero. `trainer()` is the door; nothing else here is imported before torch is there."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from relief_onnx.errors import RecipeError

__all__ = ["trainer"]


def trainer() -> ModuleType:
    """The module `loop`. Raises RecipeError where torch is not installed."""
    if find_spec("torch") is None:
        raise RecipeError(
            "retraining needs torch, which is not installed; run: pip install relief-onnx[retrain], or use --repair least-squares"
        )
    from relief_onnx.retrain import loop

    return loop
