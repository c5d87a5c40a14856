"""How operators move channels: the oracle is the operator itself, run on the numbers of the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from builders import Net
from onnx.reference import ReferenceEvaluator

from relief_onnx.graph import Graph
from relief_onnx.model import prepare
from relief_onnx.moves import NEW, UNTRACKED, Barrier, Together, pad_places, pads_of
from relief_onnx.ops import OPERATORS

C = 8
Build = Callable[[Net, str], Any]
MOVES: dict[str, Build] = {
    "Slice": lambda net, x: net.op("Slice", x, net.ints(-6), net.ints(-1), net.ints(-3)),
    "Slice/backwards": lambda net, x: net.op("Slice", x, net.ints(-1), net.ints(-(2**63) + 1), net.ints(1), net.ints(-2)),
    "Gather": lambda net, x: net.op("Gather", x, net.ints(3, -1, 0, 3), axis=1),
    "Gather/two axes": lambda net, x: net.op("Gather", x, net.constant(np.array([[7, 0, 1], [2, 2, -3]])), axis=-3),
    "Tile": lambda net, x: net.op("Tile", x, net.ints(1, 3, 1, 1)),
    "Pad": lambda net, x: net.op("Pad", x, net.ints(0, 2, 0, 0, 0, 1, 0, 0), net.constant(np.float32(0))),
    "Pad/axes": lambda net, x: net.op("Pad", x, net.ints(2, 1), net.constant(np.float32(0)), net.ints(1)),
    "Transpose": lambda net, x: net.op("Transpose", x, perm=[0, 2, 3, 1]),
    "Reshape": lambda net, x: net.op("Reshape", x, net.ints(0, 2, -1, 1, 1)),
    "Flatten": lambda net, x: net.op("Flatten", x),
    "Squeeze": lambda net, x: net.op("Squeeze", x, net.ints(-1)),
    "Unsqueeze": lambda net, x: net.op("Unsqueeze", x, net.ints(1, -1)),
    "Split": lambda net, x: net.op("Split", x, net.ints(3, 5), outputs=2, axis=1)[1],
    "Concat": lambda net, x: net.op("Concat", x, x, axis=1),
    "SpaceToDepth": lambda net, x: net.op("SpaceToDepth", x, blocksize=1),
}


def moved(build: Build, picture: Any, size: int = 1) -> tuple[Any, Graph]:
    net = Net(opset=18)
    x = net.input(1, C, size, size)
    graph = Graph(prepare(net.model(build(net, x))))
    row = OPERATORS[graph.nodes[-1].op_type]
    assert row.carry is not None
    names = [name for slot, name in enumerate(graph.nodes[-1].input) if row.data is None or slot in row.data]
    return row.carry(graph, graph.nodes[-1], [picture] * len(names))[-1], graph


@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_what_the_operator_does(name: str) -> None:
    numbers = np.arange(1, C + 1).reshape(1, C, 1, 1)
    found, graph = moved(MOVES[name], numbers)
    assert not isinstance(found, Together)
    expected: Any = ReferenceEvaluator(graph.model).run(None, {graph.inputs[0].name: numbers.astype(np.float32)})
    assert np.array_equal(np.where(found == NEW, 0, found), expected[0])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_pixels_made_of_channels_are_held_together(mode: str) -> None:
    numbers = np.arange(C).reshape(1, C, 1, 1)
    found, graph = moved(lambda net, x: net.op("DepthToSpace", x, blocksize=2, mode=mode), numbers)
    assert isinstance(found, Together)
    (expected,) = ReferenceEvaluator(graph.model).run(None, {graph.inputs[0].name: numbers.astype(np.float32)})
    for channel in range(C // 4):
        assert sorted(found.alternatives[:, 0, channel, 0, 0].tolist()) == sorted(np.asarray(expected)[0, channel].reshape(-1).tolist())


def test_pixels_become_channels() -> None:
    numbers = np.arange(C).reshape(1, C, 1, 1)
    found, graph = moved(lambda net, x: net.op("SpaceToDepth", x, blocksize=2), numbers, 2)
    whole = np.broadcast_to(numbers, (1, C, 2, 2)).astype(np.float32)
    (expected,) = ReferenceEvaluator(graph.model).run(None, {graph.inputs[0].name: whole})
    assert np.array_equal(found, np.asarray(expected))


def test_groups_that_are_normalised_together_go_together() -> None:
    numbers = np.arange(C).reshape(1, C, 1, 1)
    found, _ = moved(lambda net, x: net.op("GroupNormalization", x, net.bias(4), net.bias(4), num_groups=4), numbers)
    assert isinstance(found, Together)
    assert [set(found.alternatives[:, 0, place, 0, 0].tolist()) for place in range(C)] == [{place // 2 * 2, place // 2 * 2 + 1} for place in range(C)]


def test_what_is_not_tracked_stays_so() -> None:
    for build in MOVES.values():
        found, _ = moved(build, np.full((1, 1, 1, 1), UNTRACKED))
        assert not isinstance(found, Together)
        assert set(found.reshape(-1).tolist()) == {UNTRACKED}


def test_a_barrier_names_the_axes() -> None:
    with pytest.raises(Barrier, match="it reduces over channels") as caught:
        moved(lambda net, x: net.op("ReduceMax", x, net.ints(-3)), np.arange(C).reshape(1, C, 1, 1))
    assert caught.value.axes == (1,)


def test_pads_with_axes_in_the_order_of_all_axes() -> None:
    net = Net(opset=18)
    x = net.input(1, C, 4, 4)
    graph = Graph(net.model(net.op("Pad", x, net.ints(1, 2, 3, 4), "", net.ints(-1, 1))))
    assert pads_of(graph, graph.nodes[0], 4) == [0, 2, 0, 1, 0, 4, 0, 3]
    assert pad_places(graph, graph.nodes[0], 4) == [3, 1, 7, 5]
