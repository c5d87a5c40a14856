"""What can be pruned in a model, as values: layers with their biases, and weights that are left alone with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from relief_onnx.geometry import Geometry
from relief_onnx.reasons import TABLE_REASON
from relief_onnx.recurrent_layers import Recurrent
from relief_onnx.views import View

__all__ = ["Bias", "Geometry", "Layer", "Plan", "Skipped"]


@dataclass(frozen=True)
class Bias:
    """The constant that a layer adds. `factor` is Gemm's beta; `node` is the Add that holds it, or the layer's own number.

    shared: other nodes read it too, or it is one number for all units, so it is not changed for one of them alone.
    """

    name: str
    view: View
    factor: float
    node: int
    shared: bool


@dataclass(frozen=True)
class Layer:
    """One node with a prunable weight. Axes are those of the activation tensors.

    A recurrent node is two layers, W and R (`recurrent`). What R reads is no tensor of the graph; `input` names it all the same.
    inside: the node in whose body it runs; `node` is then its mirror in the main graph (see `loops`).
    """

    node: int
    name: str
    op: str
    weight: str
    view: View
    groups: int
    input: str
    input_axis: int
    output: str
    output_axis: int
    geometry: Geometry | None = None
    scale: float = 1.0
    bias: Bias | None = None
    recurrent: Recurrent | None = None

    @property
    def key(self) -> int:
        """A number of its own among all layers: the node's, of R of a recurrent node one below 0."""
        return ~self.node if self.recurrent is not None and self.recurrent.part == "R" else self.node

    @property
    def reads(self) -> str:
        """What statistics listen to: the input, of a recurrent node the steps that count (see `recurrent_reads`)."""
        return self.input if self.recurrent is None else f"{self.output}/{self.recurrent.part}/reads"

    inside: int | None = None

    @property
    def is_convolution(self) -> bool:
        """Whether a unit of the mask is a whole kernel."""
        return self.geometry is not None

    @property
    def is_table(self) -> bool:
        """Whether the weight is an embedding table: a dense layer whose input is one-hot, given as the number of a row."""
        return self.op == "Gather"

    @property
    def is_grouped_transposed(self) -> bool:
        """Whether the weight is stored as a transposed convolution with groups has it: [in, out per group, *kernel]."""
        transposed = self.geometry is not None and self.geometry.transposed
        return transposed and self.groups > 1 and [kind for kind, _ in self.view.steps] == ["reshape", "transpose", "reshape"]

    @property
    def out_channels(self) -> int:
        """Neurons or filters."""
        return self.view.shape[0]

    @property
    def width(self) -> int:
        """Channels of what it makes, of a recurrent layer in each direction."""
        return self.out_channels if self.recurrent is None else self.recurrent.hidden

    @property
    def in_per_group(self) -> int:
        """Inputs that each neuron or filter reads."""
        return self.view.shape[1]


@dataclass(frozen=True)
class Skipped:
    """A weight that some tool could prune and that this one leaves alone, with the reason."""

    node: str
    op: str
    weight: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """What can be pruned in a model, and what cannot and why.

    `tables` are the readers of embedding tables; where a dense layer shares the table (a tied head), that layer is among them.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    tables: tuple[Layer, ...] = ()

    def single(self) -> dict[int, Layer]:
        """The layers that are all of their node, by its number."""
        return {layer.node: layer for layer in self.layers if layer.recurrent is None}

    def recurrent(self) -> dict[int, dict[str, Layer]]:
        """Layers W and R of recurrent nodes, by its number; of some nodes one of them only."""
        found: dict[int, dict[str, Layer]] = {}
        for layer in self.layers:
            if layer.recurrent is not None:
                found.setdefault(layer.node, {})[layer.recurrent.part] = layer
        return found

    def by_weight(self) -> dict[str, tuple[Layer, ...]]:
        """The layers that read each weight; more than one where it is shared."""
        return _by_weight(self.layers)

    def by_table(self) -> dict[str, tuple[Layer, ...]]:
        """The readers of each embedding table."""
        return _by_weight(self.tables)

    @property
    def unranked(self) -> tuple[Skipped, ...]:
        """`skipped`, and the tables, which are only ranked where the user names them."""
        rows = []
        for weight, users in self.by_table().items():
            first = next(layer for layer in users if layer.is_table)
            rows.append(Skipped(first.name, first.op, weight, first.view.source, TABLE_REASON))
        return (*self.skipped, *rows)


def _by_weight(layers: tuple[Layer, ...]) -> dict[str, tuple[Layer, ...]]:
    found: dict[str, tuple[Layer, ...]] = {}
    for layer in layers:
        found[layer.weight] = (*found.get(layer.weight, ()), layer)
    return found
