"""Law: a score is what five slow lines of the paper's formula give in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from builders import Net
from numpy.typing import NDArray
from onnx import numpy_helper

import relief_onnx

Array = NDArray[Any]
RTOL = 1e-6


# -- the oracle ------------------------------------------------------------------------------------------------------------


def convolve(x: Array, k: Array, strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int]) -> Array:
    """One image with one kernel, in any number of axes; pads as ONNX has them."""
    rank = x.ndim
    x = np.pad(x, [(pads[i], pads[rank + i]) for i in range(rank)])
    reach = [(k.shape[i] - 1) * dilations[i] + 1 for i in range(rank)]
    out = np.zeros([(x.shape[i] - reach[i]) // strides[i] + 1 for i in range(rank)])
    for place in np.ndindex(*out.shape):
        for offset in np.ndindex(*k.shape):
            out[place] += k[offset] * x[tuple(place[i] * strides[i] + offset[i] * dilations[i] for i in range(rank))]
    return out


def scatter(x: Array, k: Array, strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int], extra: Sequence[int]) -> Array:
    """One image with one kernel, transposed: every input pixel stamps the kernel on the output."""
    rank = x.ndim
    full = [strides[i] * (x.shape[i] - 1) + extra[i] + (k.shape[i] - 1) * dilations[i] + 1 for i in range(rank)]
    out = np.zeros(full)
    for place, offset in product(np.ndindex(*x.shape), np.ndindex(*k.shape)):
        out[tuple(place[i] * strides[i] + offset[i] * dilations[i] for i in range(rank))] += x[place] * k[offset]
    return out[tuple(slice(pads[i], full[i] - pads[rank + i]) for i in range(rank))]


Slide = Callable[[Array, Array], Array]


def naive_convolution(criterion: str, x: Array, w: Array, b: Array, groups: int, slide: Slide) -> tuple[Array, Array]:
    """x [N, C, *space], w [out, in per group, *kernel], b [out]: shares and bias shares."""
    x, w, b = np.abs(x.astype(float)), np.abs(w.astype(float)), np.abs(b.astype(float))
    score = np.zeros(w.shape[:2])
    for j, i in np.ndindex(*score.shape):
        channel = x[:, j // (len(w) // groups) * w.shape[1] + i]
        if criterion == "relief":
            score[j, i] = np.mean([np.linalg.norm(slide(image, w[j, i])) for image in channel])
        elif criterion == "relief-fast":
            score[j, i] = np.linalg.norm(slide(channel.mean(0), w[j, i]))
        elif criterion == "wanda":
            score[j, i] = np.linalg.norm(w[j, i]) * np.sqrt(np.mean(channel**2))
        else:
            score[j, i] = np.linalg.norm(w[j, i])
    positions = slide(x[0, 0], w[0, 0]).size
    return shares(score, b * (np.sqrt(positions) if criterion.startswith("relief") else 1.0))


def naive_dense(criterion: str, x: Array, w: Array, b: Array) -> tuple[Array, Array]:
    """x [samples, in], w [out, in], b [out], both as the node applies them (alpha and beta within)."""
    x, w, b = np.abs(x.astype(float)), np.abs(w.astype(float)), np.abs(b.astype(float))
    measure = {"relief": x.mean(0), "relief-fast": x.mean(0), "wanda": np.sqrt((x**2).mean(0)), "magnitude": np.ones(x.shape[1])}
    return shares(w * measure[criterion], b)


def shares(score: Array, bias: Array) -> tuple[Array, Array]:
    total = score.sum(1) + bias
    return score / total[:, None], bias / total


# -- the table -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """A convolution on `space`; `plain` are pads and output padding as numbers where the node says them in another way."""

    space: tuple[int, ...]
    kernel: tuple[int, ...]
    channels: tuple[int, int] = (3, 4)
    values: dict[str, Any] = field(default_factory=dict)
    pads: tuple[int, ...] | None = None
    transposed: bool = False
    bias: bool = True
    samples: int = 5


CONVOLUTIONS = {
    "1d": Conv((9,), (3,)),
    "1d stride": Conv((10,), (4,), values={"strides": [3], "pads": [1, 2]}),
    "2d": Conv((6, 5), (3, 2)),
    "3d": Conv((3, 4, 5), (2, 1, 3), values={"pads": [0, 0, 1, 1, 0, 1]}),
    "3d stride": Conv((4, 4, 5), (3, 3, 3), values={"pads": [1] * 6, "strides": [2, 1, 2]}),
    "no bias": Conv((6, 5), (3, 3), bias=False),
    "stride": Conv((7, 8), (3, 3), values={"strides": [2, 3], "pads": [1] * 4}),
    "dilation": Conv((9, 8), (3, 3), values={"dilations": [2, 3], "pads": [2, 0, 1, 3]}),
    "pads asymmetric": Conv((5, 6), (3, 3), values={"pads": [0, 2, 1, 0]}),
    "groups": Conv((5, 5), (3, 3), (6, 4), {"group": 2, "pads": [1] * 4}),
    "depthwise": Conv((5, 6), (3, 3), (4, 4), {"group": 4, "pads": [1] * 4}),
    "depthwise times 2": Conv((5, 6), (5, 5), (3, 6), {"group": 3, "pads": [2] * 4, "strides": [2, 2]}),
    "same upper": Conv((5, 6), (3, 2), values={"auto_pad": "SAME_UPPER", "strides": [2, 1]}, pads=(1, 0, 1, 1)),
    "same lower": Conv((6, 6), (3, 2), values={"auto_pad": "SAME_LOWER", "strides": [2, 1]}, pads=(1, 1, 0, 0)),
    "same 3x3": Conv((4, 5), (3, 3), values={"auto_pad": "SAME_UPPER"}, pads=(1, 1, 1, 1)),
    "valid": Conv((5, 6), (3, 3), values={"auto_pad": "VALID"}, pads=(0,) * 4),
    "1x1": Conv((4, 5), (1, 1), (5, 3)),
    "1x1 stride": Conv((5, 6), (1, 1), values={"strides": [2, 2]}),
    "1x1 groups": Conv((4, 4), (1, 1), (4, 4), {"group": 2}),
    "1x1 padded": Conv((4, 4), (1, 1), values={"pads": [1, 0, 1, 2]}),
    **{
        f"3x3 on {height}x{width}": Conv((height, width), (3, 3), (2, 3), {"pads": [1] * 4}, samples=3)
        for height, width in ((2, 2), (2, 3), (3, 2), (3, 3), (4, 7), (5, 2), (9, 5), (1, 5), (1, 1), (5, 1))
    },
    "transposed": Conv((4, 3), (3, 3), transposed=True),
    "transposed stride": Conv((4, 3), (3, 2), values={"strides": [2, 3], "pads": [1, 0, 0, 1]}, transposed=True),
    "transposed groups": Conv((3, 4), (2, 2), (4, 6), {"group": 2, "strides": [2, 2]}, transposed=True),
    "transposed output padding": Conv(
        (3, 3), (3, 3), values={"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}, transposed=True
    ),
    "transposed dilation": Conv((3, 4), (3, 2), values={"dilations": [2, 3]}, transposed=True),
    "transposed output shape": Conv((3, 3), (3, 3), values={"strides": [2, 2], "output_shape": [6, 6]}, pads=(1, 1, 0, 0), transposed=True),
    "transposed same upper": Conv((3, 3), (3, 3), values={"strides": [2, 2], "auto_pad": "SAME_UPPER"}, pads=(0, 0, 1, 1), transposed=True),
    "transposed same lower": Conv((3, 3), (3, 3), values={"strides": [2, 2], "auto_pad": "SAME_LOWER"}, pads=(1, 1, 0, 0), transposed=True),
    "transposed 1d": Conv((5,), (4,), values={"strides": [2], "pads": [1, 1]}, transposed=True),
    "transposed 1x1": Conv((3, 3), (1, 1), values={"strides": [2, 2]}, transposed=True),
}  # fmt: skip

CRITERIA = ("relief", "relief-fast", "magnitude", "wanda")


def convolution(case: Conv, dtype: Any = np.float32, batch: int | str = "N") -> tuple[onnx.ModelProto, Array, Array, Array, Slide]:
    """The model, its input, and weight [out, in per group, *kernel], bias and slide for the oracle."""
    net = Net(seed=3, dtype=dtype)
    (inputs, outputs), groups, rank = case.channels, case.values.get("group", 1), len(case.kernel)
    name = net.input(batch, inputs, *case.space)
    shape = (inputs, outputs // groups) if case.transposed else (outputs, inputs // groups)
    weight = net.weight(*shape, *case.kernel)
    bias = [net.bias(outputs)] if case.bias else []
    model = net.model(net.op("ConvTranspose" if case.transposed else "Conv", name, weight, *bias, **case.values))
    x = net.rng.standard_normal((case.samples, inputs, *case.space)).astype(dtype)
    w = net.initializers[weight]
    strides, dilations = (case.values.get(key, [1] * rank) for key in ("strides", "dilations"))
    pads = case.pads or case.values.get("pads", [0] * 2 * rank)
    extra = case.values.get("output_padding", [0] * rank)
    if case.transposed:
        w = np.concatenate([part.swapaxes(0, 1) for part in np.split(w, groups)])
    slide: Slide = (
        (lambda image, k: scatter(image, k, strides, dilations, pads, extra))
        if case.transposed
        else (lambda image, k: convolve(image, k, strides, dilations, pads))
    )
    return model, x, w, net.initializers[bias[0]] if bias else np.zeros(outputs), slide


def measured(model: onnx.ModelProto, feeds: Sequence[Array], criterion: str) -> list[Any]:
    name = model.graph.input[0].name
    return list(relief_onnx.score(model, [{name: x} for x in feeds], criterion=criterion).values())


def assert_scores(found: Any, wanted: tuple[Array, Array], rtol: float = RTOL) -> None:
    np.testing.assert_allclose(found.score, wanted[0], rtol=rtol)
    np.testing.assert_allclose(found.bias_score, wanted[1], rtol=rtol)
    np.testing.assert_allclose(found.score.sum(1) + found.bias_score, 1.0, rtol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_oracle_slides_as_onnxruntime_does(name: str) -> None:
    """The oracle's own convolution, judged by onnxruntime: one input channel after the other, summed."""
    from relief_onnx.session import Session

    case = CONVOLUTIONS[name]
    model, x, w, b, slide = convolution(case)
    groups = case.values.get("group", 1)
    (found,) = Session(model).run({model.graph.input[0].name: x})
    for j in range(len(w)):
        first = j // (len(w) // groups) * w.shape[1]
        wanted = [sum(slide(image[first + i].astype(float), w[j, i].astype(float)) for i in range(w.shape[1])) + b[j] for image in x]
        np.testing.assert_allclose(found[:, j], np.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, criterion: str) -> None:
    case = CONVOLUTIONS[name]
    model, x, w, b, slide = convolution(case)
    (found,) = measured(model, [x], criterion)
    assert_scores(found, naive_convolution(criterion, x, w, b, case.values.get("group", 1), slide))


# A dense case builds a model and says what it computes: (net) -> output name; and from the fed x: rows [samples, in], W [out, in], b [out].
Dense = Callable[[Net], tuple[str, tuple[int | str, ...], Callable[[Array], Array], Array, Array]]


def gemm(
    right: bool = True, flip_a: int = 0, flip_b: int = 0, alpha: float = 1.0, beta: float = 1.0, c: tuple[int, ...] | None = None
) -> Dense:
    def build(net: Net) -> Any:
        flips = {"transA": flip_a, "transB": flip_b, "alpha": alpha, "beta": beta}
        w = net.rng.standard_normal((4, 6)).astype(np.float32)
        b = net.bias(*(c if c is not None else (4,) if right else (4, 1)))
        if right:
            weight = net.constant(w if flip_b else w.T.copy())
            x = net.input(6, 5) if flip_a else net.input("N", 6)
            out = net.op("Gemm", x, weight, b, **flips)
            rows: Any = (lambda x: x.T) if flip_a else (lambda x: x)
        else:
            weight = net.constant(w.T.copy() if flip_a else w)
            x = net.input("N", 6) if flip_b else net.input(6, 5)
            out = net.op("Gemm", weight, x, b, **flips)
            rows = (lambda x: x) if flip_b else (lambda x: x.T)
        return out, rows, alpha * w, np.broadcast_to(beta * net.initializers[b].reshape(-1), 4)

    return build


def matmul(shape: tuple[int | str, ...], right: bool = True, add: str = "") -> Dense:
    def build(net: Net) -> Any:
        size = int(shape[-1] if right else shape[-2])
        w, x = net.rng.standard_normal((4, size)).astype(np.float32), net.input(*shape)
        out = net.op("MatMul", x, net.constant(w.T.copy())) if right else net.op("MatMul", net.constant(w), x)
        b = np.zeros(4)
        if add:
            name = net.bias(4) if right else net.bias(4, 1)
            b = net.initializers[name].reshape(-1)
            out = net.op("Add", out, name) if add == "after" else net.op("Add", name, out)
        return out, (lambda x: x.reshape(-1, size) if right else np.moveaxis(x, -2, -1).reshape(-1, size)), w, b

    return build


def behind(form: str) -> Dense:
    """The weight reaches its Gemm through another node."""

    def build(net: Net) -> Any:
        w = net.rng.standard_normal((4, 6)).astype(np.float32)
        forms: dict[str, Callable[[], str]] = {
            "transpose": lambda: net.op("Transpose", net.constant(w)),
            "reshape": lambda: net.op("Reshape", net.constant(w.T.reshape(2, 3, 4)), net.ints(6, -1)),
            "squeeze": lambda: net.op("Squeeze", net.constant(w.T.reshape(1, 6, 1, 4)), net.ints(0, 2)),
            "unsqueeze": lambda: net.op("Squeeze", net.op("Unsqueeze", net.constant(w.T.copy()), net.ints(0, -1)), net.ints(0, 3)),
            "cast": lambda: net.op("Cast", net.constant(w.T.astype(np.float16)), to=1),
            "identity": lambda: net.op("Identity", net.constant(w.T.copy())),
            "constant": lambda: net.op("Constant", value=numpy_helper.from_array(w.T.copy())),
        }
        if form == "cast":
            w = w.astype(np.float16).astype(np.float32)
        weight, b = forms[form](), net.bias(4)
        return net.op("Gemm", net.input("N", 6), weight, b), (lambda x: x), w, net.initializers[b]

    return build


DENSE: dict[str, Dense] = {
    "gemm": gemm(),
    "gemm transB": gemm(flip_b=1),
    "gemm transA": gemm(flip_a=1),
    "gemm both": gemm(flip_a=1, flip_b=1, alpha=0.5),
    "gemm alpha beta": gemm(alpha=-0.5, beta=3.0),
    "gemm left": gemm(right=False),
    "gemm left transA": gemm(right=False, flip_a=1, beta=2.0),
    "gemm left transB": gemm(right=False, flip_b=1),
    "gemm left both": gemm(right=False, flip_a=1, flip_b=1, alpha=2.0),
    **{f"gemm, one number {list(c)}": gemm(c=c, beta=2.0) for c in ((), (1,), (1, 1))},
    "gemm left, one number": gemm(right=False, c=(1,)),
    **{f"matmul {len(shape)} axes": matmul(shape) for shape in (("N", 6), ("N", 3, 6), ("N", 2, 3, 6))},
    **{f"matmul {len(shape)} axes + bias": matmul(shape, add="after") for shape in (("N", 6), ("N", 3, 6), ("N", 2, 3, 6))},
    "bias + matmul": matmul(("N", 3, 6), add="before"),
    **{f"matmul left {len(shape)} axes": matmul(shape, right=False) for shape in ((6, 5), ("N", 6, 3), ("N", 2, 6, 3))},
    "matmul left + bias": matmul(("N", 6, 3), right=False, add="after"),
    **{form: behind(form) for form in ("transpose", "reshape", "squeeze", "unsqueeze", "cast", "identity", "constant")},
}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", DENSE)
def test_dense(name: str, criterion: str) -> None:
    net = Net(seed=4)
    out, rows, w, b = DENSE[name](net)
    _, shape, _ = net.inputs[0]
    x = net.rng.standard_normal([5 if size == "N" else size for size in shape]).astype(np.float32)
    (found,) = measured(net.model(out), [x], criterion)
    assert_scores(found, naive_dense(criterion, rows(x), w, b))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_shared_weight(criterion: str) -> None:
    """Each node that reads a weight has its own scores."""
    net = Net(seed=5)
    x = net.input("N", 4)
    weight, biases = net.weight(4, 4), [net.bias(4), net.bias(4)]
    first = net.op("Gemm", x, weight, biases[0], transB=1)
    model = net.model(net.op("Gemm", net.op("Relu", first), weight, biases[1]))
    data = net.rng.standard_normal((7, 4)).astype(np.float32)
    found = measured(model, [data], criterion)
    w, b = net.initializers[weight], [net.initializers[name] for name in biases]
    assert_scores(found[0], naive_dense(criterion, data, w, b[0]))
    hidden = np.maximum(data.astype(float) @ w.T + b[0], 0)
    assert_scores(found[1], naive_dense(criterion, hidden, w.T, b[1]))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["2d", "3x3 on 4x7", "1x1", "transposed stride"])
def test_how_samples_are_split_does_not_matter(name: str, criterion: str) -> None:
    model, x, *_ = convolution(CONVOLUTIONS[name])
    (whole,), (parts,), (single,) = (measured(model, feeds, criterion) for feeds in ([x], [x[:1], x[1:]], list(x[:, None])))
    for other in (parts, single):
        assert_scores(other, (whole.score, whole.bias_score))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_fixed_batch_size(criterion: str) -> None:
    """Ten samples through a model that takes four at a time: each counts once."""
    case = Conv((4, 5), (3, 3), values={"pads": [1] * 4}, samples=10)
    model, x, w, b, slide = convolution(case, batch=4)
    (found,) = measured(model, [x], criterion)
    assert_scores(found, naive_convolution(criterion, x, w, b, 1, slide))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_half_precision(criterion: str) -> None:
    case = Conv((4, 5), (3, 3), values={"pads": [1] * 4})
    model, x, w, b, slide = convolution(case, dtype=np.float16)
    (found,) = measured(model, [x], criterion)
    assert_scores(found, naive_convolution(criterion, x, w, b, 1, slide), rtol=1e-5)


def test_unit_without_contribution_scores_zero() -> None:
    net = Net()
    weight = net.constant(np.zeros((2, 3), np.float32))
    (found,) = measured(net.model(net.op("Gemm", net.input("N", 3), weight, transB=1)), [np.ones((4, 3), np.float32)], "relief")
    assert not found.score.any()
    assert not found.bias_score.any()


def test_score_stays_a_function_after_its_modules_are_imported() -> None:
    assert callable(relief_onnx.score)
    assert callable(relief_onnx.prune)
    assert callable(relief_onnx.score)
