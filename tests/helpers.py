"""What several test files share: the sample model, data as arrays, and running the command line."""

from __future__ import annotations

import functools
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from relief_onnx_cli.main import main

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "sample_models"
LENET = SAMPLES / "lenet5.onnx"
CALIB = SAMPLES / "digits" / "calib"
TEST = SAMPLES / "digits" / "test"


@functools.cache
def digits(count: int = 32) -> Any:
    """The first calibration digits as the model's input, float32 [count, 1, 28, 28]."""
    files = sorted(CALIB.glob("*.png"))[:count]
    return np.stack([np.asarray(Image.open(file), np.float32)[None] / 255 for file in files])


def run(*arguments: object) -> Result:
    """The command line inside this process; fails the test where anything but a ReliefError escapes."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def program() -> list[str]:
    """The installed command."""
    script = Path(sysconfig.get_path("scripts")) / "relief-onnx"
    return [str(script)] if script.exists() else [sys.executable, "-m", "relief_onnx_cli"]


def process(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    return subprocess.run(
        [*program(), *(str(argument) for argument in arguments)], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


def real_model(name: str) -> Path:
    """A third-party model, from beside the project or as `make bench-zoo` gathers it. Skips the test where it is neither here nor there."""
    for folder in (ROOT.parent / "shared" / "models", ROOT / "build" / "zoo"):
        if (folder / f"{name}.onnx").exists():
            return folder / f"{name}.onnx"
    pytest.skip(f"{name}.onnx is neither in ../shared/models nor gathered; `make bench-zoo` brings it")


def lenet() -> onnx.ModelProto:
    """A fresh copy of the sample model."""
    return onnx.load(str(LENET))
