"""The arena that working sessions share: registered once in a process, and not needed for a result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import Net

from relief_onnx import session
from relief_onnx.session import Session

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def model() -> onnx.ModelProto:
    net = Net()
    return net.model(net.op("Relu", net.op("MatMul", net.input("N", 4), net.weight(4, 5))))


def answer(working: bool) -> Any:
    return Session(model(), 1, working=working).run({"x1": X})[0]


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a process that has had no working session yet."""
    session._shared_memory.cache_clear()
    yield
    session._shared_memory.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_threads_register_one_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def register(*arguments: object) -> None:
        time.sleep(0.05)  # so that the others come while it runs
        asked.append(arguments)

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", register)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, [True] * 8))
    assert len(asked) == 1
    for one in found:
        np.testing.assert_array_equal(one, answer(False))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("error", [RuntimeError, session.LOAD_ERRORS[0]])
def test_an_arena_that_is_refused_changes_no_result(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions of onnxruntime do where the user of the library has registered one before."""
    asked: list[object] = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise error("an allocator of that memory is registered already")

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", refuse)
    np.testing.assert_array_equal(answer(True), answer(False))
    answer(True)
    assert len(asked) == 1


@pytest.mark.usefixtures("fresh")
def test_an_arena_of_the_user() -> None:
    place = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(place, None)
    np.testing.assert_array_equal(answer(True), answer(False))
