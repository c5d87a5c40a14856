"""Streaming statistics of activations: small objects with constant memory.

Each takes batches of one tensor and hands out `jobs`: independent pieces of work that a thread pool runs side by side (numpy releases
the lock inside them). Sums are kept in float64. `weight` counts every sample of a batch that often (see `Batch.weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from relief_onnx.gram import PatchStatistics, Shifts, offset_sums, output_positions, padding, statistics
from relief_onnx.layers import Geometry, Layer

__all__ = [
    "ChannelMaximum",
    "ChannelMean",
    "Contribution",
    "ImageNorm",
    "InputMeans",
    "Job",
    "KernelNorm",
    "MeanImage",
    "Moment",
    "OffsetMean",
    "ResponseNorm",
    "Statistic",
    "as_read",
    "kernel_statistic",
    "response_positions",
]

Job = Callable[[], None]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Moment = Literal["absolute", "signed", "squares"]

# What one job reads at a time. Numpy's cost per call asks for large blocks, memory and idle threads for small ones.
BLOCK_BYTES = 2 << 20
# What the products of one job hold at a time: about the size of a core's own cache.
PRODUCT_BYTES = 1 << 19
# Rows of a dense layer that are summed in float32 before float64 takes over.
ROWS = 256


class Statistic(Protocol):
    """Anything that is fed with activations."""

    TOTALS: ClassVar[tuple[str, ...]]  # see `sharding`

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        """The work that adding the batch `x` takes."""
        ...


class Contribution(Statistic, Protocol):
    """A statistic from which the share of each connection or single weight follows."""

    def contributions(self, layer: Layer, magnitude: NDArray[Any]) -> tuple[Doubles, float]:
        """(contributions, what a bias of 1 contributes), for |W| in canonical layout.

        Contributions are those of connections [out, in per group] or of single weights [out, in per group, *kernel].
        """
        ...


def _blocks(channels: int, bytes_each: int, bytes_at_once: int) -> Iterator[slice]:
    step = max(1, min(channels, bytes_at_once // max(bytes_each, 1)))
    yield from (slice(start, min(start + step, channels)) for start in range(0, channels, step))


def _per_unit(layer: Layer, magnitude: NDArray[Any], vector: Doubles) -> Doubles:
    """|w_ij| (or the norm of a kernel) times a number per input channel [C] -> [out, in per group]."""
    norms = np.sqrt(np.square(magnitude, dtype=np.float64).reshape(*magnitude.shape[:2], -1).sum(-1))
    result: Doubles = norms * as_read(layer, vector)
    return result


def as_read(layer: Layer, values: Doubles) -> Doubles:
    """Numbers per input channel [C, ...] as each output unit reads them: [out, in per group, ...]."""
    grouped = values.reshape(layer.groups, layer.in_per_group, *values.shape[1:])
    return np.repeat(grouped, layer.out_channels // layer.groups, 0)


class _Positions:
    """mean over samples of sqrt(H_out W_out): what a bias of 1 contributes to a convolution."""

    TOTALS: ClassVar[tuple[str, ...]] = ("_sum", "_count")

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._sum = 0.0
        self._count = 0.0

    def add(self, x: Floats, weight: float) -> None:
        self._sum += weight * len(x) * float(np.sqrt(output_positions(self._geometry, x.shape[2:])))
        self._count += weight * len(x)

    @property
    def samples(self) -> float:
        return max(self._count, 1e-300)

    @property
    def bias_factor(self) -> float:
        return self._sum / self.samples


class ImageNorm:
    """mean_n ||x_ni||_F per channel, over the pixels that a kernel of one weight sees: the score of a 1x1 convolution."""

    TOTALS: ClassVar[tuple[str, ...]] = ("_positions", "_sum")

    def __init__(self, geometry: Geometry) -> None:
        self._positions = _Positions(geometry)
        self._strides = (1,) * len(geometry.strides) if geometry.transposed else geometry.strides
        self._sum: Any = 0.0

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        self._positions.add(x, weight)
        yield partial(self._add, x, weight)

    def _add(self, x: Floats, weight: float) -> None:
        if any(stride > 1 for stride in self._strides):
            x = np.ascontiguousarray(x[(slice(None), slice(None), *(slice(None, None, stride) for stride in self._strides))])
        flat = x.reshape(*x.shape[:2], -1)
        self._sum = self._sum + weight * np.sqrt(np.vecdot(flat, flat)).sum(0, dtype=np.float64)

    def contributions(self, layer: Layer, magnitude: NDArray[Any]) -> tuple[Doubles, float]:
        return _per_unit(layer, magnitude, self._sum / self._positions.samples), self._positions.bias_factor


class KernelNorm:
    """mean_n || |K_ij| * |x_ni| ||_F for every kernel of one layer: the paper's convolution score, in closed form."""

    TOTALS: ClassVar[tuple[str, ...]] = ("_positions", "_sum")

    def __init__(self, layer: Layer, weight: NDArray[Any]) -> None:
        assert layer.geometry is not None
        self._geometry = layer.geometry
        self._positions = _Positions(layer.geometry)
        # A view, not a copy: the copies of all layers together would weigh as much as the model.
        self._weight = weight.reshape(layer.groups, layer.out_channels // layer.groups, *weight.shape[1:])
        # Coefficients are needed as [in channel, S, filter of its group].
        self._plans: dict[tuple[int, ...], tuple[PatchStatistics, Floats]] = {}
        channels = layer.groups * layer.in_per_group
        self._sum = np.zeros((channels, layer.out_channels // layer.groups))

    def _plan(self, space: tuple[int, ...]) -> tuple[PatchStatistics, Floats]:
        if space not in self._plans:
            found = statistics(self._geometry, space)
            coefficients = np.moveaxis(found.coefficients(np.abs(self._weight).astype(np.float32, copy=False)), 1, 3)
            self._plans = {space: (found, np.ascontiguousarray(coefficients.reshape(-1, *coefficients.shape[2:])))}
        return self._plans[space]

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        self._positions.add(x, weight)
        plan, coefficients = self._plan(x.shape[2:])
        pixels = int(np.prod(x.shape[2:])) + 1
        for block in _blocks(x.shape[1], len(x) * pixels * 4, BLOCK_BYTES):
            yield partial(self._add, x, weight, plan, coefficients, block)

    def _add(self, x: Floats, weight: float, plan: PatchStatistics, coefficients: Floats, block: slice) -> None:
        features = plan.features(x[:, block]).swapaxes(0, 1)
        ones = np.full((1, len(x)), weight, np.float32)
        for part in _blocks(len(features), len(x) * self._sum.shape[1] * 4, PRODUCT_BYTES):
            place = slice(block.start + part.start, block.start + part.stop)
            norms = features[part] @ coefficients[place]
            np.sqrt(norms, out=norms)
            self._sum[place] += (ones @ norms)[:, 0]

    def contributions(self, layer: Layer, magnitude: NDArray[Any]) -> tuple[Doubles, float]:
        table = (self._sum / self._positions.samples).reshape(layer.groups, layer.in_per_group, -1)
        return table.swapaxes(1, 2).reshape(layer.out_channels, layer.in_per_group), self._positions.bias_factor


class ResponseNorm:
    """The same as `KernelNorm` from squared norms that the probe computes in the graph; for small convolutions the faster way."""

    TOTALS: ClassVar[tuple[str, ...]] = ("_sum", "_count")

    def __init__(self, layer: Layer, positions: int) -> None:
        self._bias_factor = float(np.sqrt(positions))
        self._sum = np.zeros(layer.out_channels * layer.in_per_group)
        self._count = 0.0

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        yield partial(self._add, x, weight)

    def _add(self, x: Floats, weight: float) -> None:
        self._sum += weight * np.sqrt(x).sum(0, dtype=np.float64)
        self._count += weight * len(x)

    def contributions(self, layer: Layer, magnitude: NDArray[Any]) -> tuple[Doubles, float]:
        table = (self._sum / max(self._count, 1e-300)).reshape(layer.groups, layer.in_per_group, -1)
        return table.swapaxes(1, 2).reshape(layer.out_channels, layer.in_per_group), self._bias_factor


class InputMeans:
    """Means over the samples of what a layer reads: of |x|, of x and of x^2, whichever are wanted, all from one look at x.

    Of a convolution the mean image is kept, images of several sizes apart, so that layers of any geometry may share one statistic. Of
    a dense layer the mean per channel along `axis`, over every other axis; `axis` given for a convolution does the same.
    """

    TOTALS: ClassVar[tuple[str, ...]] = ("_sums", "_counts")

    def __init__(self, axis: int | None, *, power: int = 1, per_weight: bool = False, signed: bool = False, squares: bool = False) -> None:
        """`axis` None keeps images. `power` 1 or 2: contributions come from |x| or from x^2 (its root); `per_weight`: of single weights.

        `signed` and `squares` ask for the means of x and of x^2 too.
        """
        self._axis, self._power, self._per_weight = axis, power, per_weight
        self._wanted: dict[Moment, bool] = {
            "absolute": power == 1,
            "signed": signed,
            "squares": squares or power == 2,
        }
        self._sums: dict[tuple[int, ...], dict[Moment, Doubles]] = {}
        self._counts: dict[tuple[int, ...], float] = {}

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        # What is never negative, as after Relu, is its own magnitude. Most of what is negative somewhere is so in the first sample.
        plain = self._wanted["absolute"] and x.size > 0 and bool(x[0].min() >= 0) and bool(x.min() >= 0)
        if self._axis is None:
            space, count = x.shape[1:], len(x)
        else:
            # [rows before the axis, channels, what comes after]
            place = self._axis % x.ndim
            count = x.size // max(x.shape[place], 1)
            x = x.reshape(int(np.prod(x.shape[:place])), x.shape[place], int(np.prod(x.shape[place + 1 :])))
            space = x.shape[1:2]
        totals = self._sums.setdefault(space, {moment: np.zeros(space) for moment, wanted in self._wanted.items() if wanted})
        self._counts[space] = self._counts.get(space, 0.0) + weight * count
        if self._axis is not None:
            yield partial(self._add_rows, x, weight, plain, totals)
            return
        for block in _blocks(x.shape[1], len(x) * int(np.prod(space[1:])) * 4, BLOCK_BYTES):
            yield partial(self._add, x, weight, plain, totals, block)

    def _add(self, x: Floats, weight: float, plain: bool, totals: dict[Moment, Doubles], block: slice) -> None:
        for moment, image in _sums(x[:, block], totals, plain).items():
            totals[moment][block] += image if weight == 1 else weight * image

    def _add_rows(self, x: Floats, weight: float, plain: bool, totals: dict[Moment, Doubles]) -> None:
        for start in range(0, len(x), ROWS):
            for moment, image in _sums(x[start : start + ROWS], totals, plain).items():
                totals[moment] += weight * image.sum(-1, dtype=np.float64)

    def norms(self) -> Doubles:
        """|| mean_n |x_ni| ||_F per channel."""
        norms: Doubles = self._average("absolute", lambda image: np.sqrt(np.square(image).reshape(len(image), -1).sum(-1)))
        return norms

    def _average(self, moment: Moment, measure: Callable[[Doubles], Any]) -> Any:
        samples = max(sum(self._counts.values()), 1e-300)
        return sum(
            self._counts[space] / samples * measure(totals[moment] / max(self._counts[space], 1e-300))
            for space, totals in self._sums.items()
        )

    def input_means(self, layer: Layer, moment: Moment = "signed") -> Doubles:
        """The mean of x, |x| or x^2 that each weight of a layer meets: [in channels, *kernel], of a dense layer [in channels].

        It runs over the samples and over the output positions, of the pixel that the weight's offset in the kernel sees there; padding
        and the gaps of a transposed convolution count as 0. So weight times mean is the mean of what the weight adds to its output.
        """
        geometry = layer.geometry
        if (geometry is None) == (self._axis is None):
            raise ValueError(f"means of {'images' if self._axis is None else 'channels'} were measured, which {layer.name} cannot use")
        if geometry is None:
            vector: Doubles = self._average(moment, lambda mean: mean)
            return vector
        seen = self._average(moment, lambda image: offset_sums(geometry, image))
        positions = self._average(moment, lambda image: output_positions(geometry, image.shape[1:]))
        means: Doubles = seen / max(positions, 1.0)
        return means

    def contributions(self, layer: Layer, magnitude: NDArray[Any]) -> tuple[Doubles, float]:
        """As `Contribution`: |w| times the mean; of a kernel and |x|, the norm of its response to the mean image.

        At weight granularity it is a mean over the positions, so a bias of 1 contributes 1: a mean instead of a sum changes no share.
        """
        moment: Moment = "absolute" if self._power == 1 else "squares"
        geometry = layer.geometry
        if self._axis is not None:
            return _per_unit(layer, magnitude, self._average(moment, lambda mean: mean) ** (1 / self._power)), 1.0
        if self._per_weight:
            return magnitude * as_read(layer, self.input_means(layer, moment) ** (1 / self._power)), 1.0
        if geometry is None:
            raise ValueError(f"images were measured, which {layer.name} does not read")

        def one(image: Doubles) -> Doubles:
            norm = KernelNorm(layer, magnitude)
            for job in norm.jobs(image[None].astype(np.float32), 1.0):
                job()
            return norm.contributions(layer, magnitude)[0]

        bias = self._average(moment, lambda image: np.sqrt(output_positions(geometry, image.shape[1:])))
        return self._average(moment, one), float(bias)


def _sums(part: Floats, wanted: Iterable[Moment], plain: bool) -> dict[Moment, NDArray[Any]]:
    """Sums over the first axis; `plain`: no entry is negative."""
    sums: dict[Moment, NDArray[Any]] = {}
    if "signed" in wanted or ("absolute" in wanted and plain):
        sums["signed"] = part.sum(0)
    if "absolute" in wanted:
        sums["absolute"] = sums["signed"] if plain else np.abs(part).sum(0)
    if "squares" in wanted:
        sums["squares"] = np.einsum("n...,n...->...", part, part)
        if not np.isfinite(sums["squares"].max(initial=0.0)):  # too large for float32
            sums["squares"] = np.square(part, dtype=np.float64).sum(0)
    return {moment: sums[moment] for moment in wanted}


class ChannelMean(InputMeans):
    """(mean |x_i|^power)^(1/power) per channel over every other axis.

    Power 1 is all that the score of a dense layer needs; power 2 is Wanda's input norm (Sun et al. 2023), up to a constant.
    """

    def __init__(self, axis: int, power: int = 1) -> None:
        super().__init__(axis, power=power)


class MeanImage(InputMeans):
    """mean_n |x_ni| per channel and pixel. Its kernel norms are the authors' `norm of the mean`."""

    def __init__(self, geometry: Geometry | None = None) -> None:
        super().__init__(None)


class OffsetMean(InputMeans):
    """|k| * (mean |x_i|^power)^(1/power) for every single weight k of a convolution, see `InputMeans.input_means`."""

    def __init__(self, geometry: Geometry, power: int = 1) -> None:
        super().__init__(None, power=power, per_weight=True)


class ChannelMaximum:
    """max |y_j| per unit over all samples and positions: 0 means that the unit was silent."""

    TOTALS: ClassVar[tuple[str, ...]] = ("maximum",)
    UNITE = np.maximum

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self.maximum: Any = 0.0

    def jobs(self, x: Floats, weight: float) -> Iterator[Job]:
        yield partial(self._add, x)

    def _add(self, x: Floats) -> None:
        others = tuple(i for i in range(x.ndim) if i != self._axis % x.ndim)
        self.maximum = np.maximum(self.maximum, np.abs(x).max(others))


# Responses of one sample up to which a convolution is cheaper inside the graph than by its Gram matrices.
LARGEST_RESPONSE = 1 << 15


def response_positions(layer: Layer, shape: tuple[int | str | None, ...] | None, is_float32: bool) -> int | None:
    """H_out x W_out where a layer with that input is best measured in the graph, else None."""
    geometry = layer.geometry
    if geometry is None or geometry.transposed or not is_float32 or geometry.positions == 1 or not shape:
        return None
    space = tuple(size for size in shape[2:] if isinstance(size, int))
    if len(space) < len(geometry.kernel) or isinstance(statistics(geometry, space), Shifts):
        return None
    positions = output_positions(geometry, space)
    return positions if positions * layer.out_channels * layer.in_per_group <= LARGEST_RESPONSE else None


def kernel_statistic(layer: Layer, weight: NDArray[Any]) -> Contribution:
    """The paper's statistic for a layer: dense, 1x1 or kernel. `weight` is in canonical layout."""
    if layer.geometry is None:
        return ChannelMean(layer.input_axis)
    one_weight = layer.geometry.positions == 1 and all(
        begin >= 0 and end >= 0 for begin, end in padding(layer.geometry, (1,) * len(layer.geometry.kernel))
    )
    return ImageNorm(layer.geometry) if one_weight else KernelNorm(layer, weight)
