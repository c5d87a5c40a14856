"""The operator table: what each operator does to channels. Algorithms walk it and never name an operator.

A *picture* of a tensor is an array of the tensor's rank with size 1 on every axis that is not tracked. Three kinds of picture
travel through a graph in the same way: unit numbers (which channel is this), known constants, and whether anybody reads it.
A row says how a node carries pictures from its inputs to its outputs:

* `carry`    moves pictures (Reshape, Concat, pooling ...): a pure function of arrays, see `moves`;
* `mix`      element-wise: inputs are broadcast against each other, so channels that meet must live or die together;
* `affine`   like `mix`, with per-channel parameters on axis 1 (BatchNormalization ...);
* `norm`     statistics over the channel axis, with per-channel parameters: a channel can go only where it is 0, and then still counts;
* `sum`      reduces axes: a channel can go only where it is 0;
* `contract` sums products of two activations (attention): a channel can go only where either factor is 0;
* `recurrent` reads its input's last axis with one weight: a channel can go only where it is 0;
* `grow`     copies one value along new axes (Expand): an axis that is as long as another tensor's channels has those channels;
* `quantise` integers for floats or back, with a scale and zero point for all or for each place along an axis; 0 stays 0;
* `range`    measures the range of its input, 0 among it: a channel can go only where it is 0;
* no row     a barrier: the operator may see every channel, so none of its inputs' channels can go.

`relevance` says how relevance passes from outputs back to inputs, where the kind alone does not (see `relevance` for what each word means).

`constant` says what happens to a channel that is the same everywhere: "kept" unchanged, "computed" by running the operator on it,
"zero" only 0 survives (as 0), "scaled" a scale of 0 leaves the shift, "lost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx

from relief_onnx import moves
from relief_onnx.graph import Graph
from relief_onnx.moves import Carry
from relief_onnx.reshapes import reshape
from relief_onnx.scatters import scatter_nd

__all__ = ["OPERATORS", "PASSING", "OperatorRow", "passing_row_of", "row_of"]


@dataclass(frozen=True)
class OperatorRow:
    """One operator's effect on channels. `data` are the inputs that carry pictures (None: all).

    `absorbs_zero`: one input that is 0 makes the result 0, whatever the others are (finite, as activations are).
    `zeroable`: inputs whose constants are scales and shifts: with 0 there a channel that is 0 comes out as 0.
    `one_sided`: what comes out is never negative (of Clip as networks use it), so it shrinks with what makes it.
    `keeps_zero`: whether a node leaves a channel of zeros as it is, for operators that may bring in another value (None: always).
    """

    kind: str
    carry: Carry | None = None
    data: tuple[int, ...] | None = (0,)
    constant: str = "lost"
    absorbs_zero: bool = False
    zeroable: tuple[int, ...] = ()
    keeps_zero: Callable[[Graph, onnx.NodeProto], bool] | None = None
    relevance: str = ""
    one_sided: bool = False

    @property
    def flow(self) -> str:
        """How relevance passes (see `relevance`)."""
        return self.relevance or _FLOW_OF_KIND[self.kind]

    def survives(self, graph: Graph, node: onnx.NodeProto) -> str:
        """What happens to constants in this node."""
        return "lost" if self.keeps_zero is not None and not self.keeps_zero(graph, node) else self.constant


_FLOW_OF_KIND = {
    "carry": "move", "mix": "through", "affine": "through", "norm": "through", "sum": "reduce", "contract": "contract",
    "recurrent": "recurrent", "grow": "move", "quantise": "through", "range": "through",
}  # fmt: skip


def _rows(names: str, row: OperatorRow) -> dict[str, OperatorRow]:
    return dict.fromkeys(names.split(), row)


def _carry(carry: Carry, constant: str = "lost", data: tuple[int, ...] | None = (0,), relevance: str = "") -> OperatorRow:
    return OperatorRow("carry", carry, data, constant, relevance=relevance)


OPERATORS: Mapping[str, OperatorRow] = {
    **_rows(
        "LeakyRelu Elu Selu Celu Tanh Softsign HardSwish Mish Gelu Erf Neg Floor Ceil Round Sign Sin Cos Atan Asin Acos "
        "Tan Sinh Cosh Asinh Acosh Atanh Log Reciprocal ThresholdedRelu Shrink Swish Cast",
        OperatorRow("mix", constant="computed"),
    ),
    **_rows("com.microsoft.Gelu com.microsoft.FastGelu com.microsoft.QuickGelu", OperatorRow("mix", constant="computed")),
    **_rows("Relu Sigmoid HardSigmoid Softplus Exp Abs Sqrt Clip", OperatorRow("mix", constant="computed", one_sided=True)),
    **_rows("Add Sub Sum", OperatorRow("mix", data=None, constant="computed", zeroable=(0, 1), relevance="join")),
    **_rows("Max Min Mean", OperatorRow("mix", data=None, constant="computed", relevance="join")),
    **_rows("Div Pow Mod PRelu", OperatorRow("mix", data=None, constant="computed")),
    **_rows("Mul", OperatorRow("mix", data=None, constant="computed", absorbs_zero=True, zeroable=(0, 1), relevance="product")),
    **_rows("Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor", OperatorRow("mix", data=None, relevance="join")),
    **_rows("Where", OperatorRow("mix", data=None, relevance="select")),
    **_rows("Not IsNaN IsInf", OperatorRow("mix")),
    **_rows("BatchNormalization", OperatorRow("affine", constant="computed", zeroable=(1, 2))),
    **_rows("InstanceNormalization", OperatorRow("affine", constant="scaled", zeroable=(1, 2))),
    **_rows("GroupNormalization", OperatorRow("affine", moves.group_normalization, constant="scaled", zeroable=(1, 2))),
    **_rows("LayerNormalization RMSNormalization SimplifiedLayerNormalization", OperatorRow("norm", constant="scaled", zeroable=(1, 2))),
    **_rows("ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare", OperatorRow("sum", moves.reduce, constant="zero")),
    **_rows("MatMul", OperatorRow("contract", data=None)),
    **_rows("Einsum", OperatorRow("contract", data=None)),
    **_rows("Identity Dropout", _carry(moves.same, "kept")),
    **_rows("MaxPool GlobalAveragePool GlobalMaxPool", _carry(moves.spatial, "kept")),
    **_rows("AveragePool LpPool GlobalLpPool", _carry(moves.spatial, "zero")),
    **_rows("Transpose", _carry(moves.transpose, "kept")),
    **_rows("Reshape Flatten", _carry(reshape, "kept")),
    **_rows("Squeeze", _carry(moves.squeeze, "kept")),
    **_rows("Unsqueeze", _carry(moves.unsqueeze, "kept")),
    **_rows("Concat", _carry(moves.concat, "kept", data=None)),
    **_rows("Split", _carry(moves.split, "kept")),
    **_rows("Slice", _carry(moves.slice_, "kept")),
    **_rows("Gather", _carry(moves.gather, "kept")),
    **_rows("ScatterND", _carry(scatter_nd, "kept", data=(0, 2), relevance="join")),
    **_rows("GatherND", _carry(moves.gather_nd, "kept")),
    **_rows("LSTM GRU RNN", OperatorRow("recurrent")),
    **_rows("Expand", OperatorRow("grow", moves.expand, constant="kept")),
    **_rows("ConstantOfShape", OperatorRow("grow", data=(), relevance="none")),
    **_rows("Tile", _carry(moves.tile, "kept")),
    **_rows("DepthToSpace", _carry(moves.depth_to_space, "kept")),
    **_rows("SpaceToDepth", _carry(moves.space_to_depth, "kept")),
    **_rows("ReduceMax ReduceMin", _carry(moves.reduce, "kept", relevance="reduce")),
    **_rows("ReduceProd ReduceLogSum ReduceLogSumExp", _carry(moves.reduce, relevance="reduce")),
    **_rows("ArgMax ArgMin", _carry(moves.argument)),
    **_rows("Softmax Hardmax", OperatorRow("carry", moves.along_axis(-1), relevance="through", one_sided=True)),
    **_rows("LogSoftmax", _carry(moves.along_axis(-1), relevance="through")),
    **_rows("LpNormalization", _carry(moves.along_axis(-1), relevance="through")),
    **_rows("TopK", _carry(moves.along_axis(-1), relevance="through")),
    **_rows("CumSum", _carry(moves.cumulative, "zero", relevance="through")),
    **_rows("Resize Upsample", _carry(moves.resize, "zero")),
    **_rows("GridSample", _carry(moves.spatial, "zero", relevance="through")),
    **_rows("RoiAlign", _carry(moves.spatial, "zero", relevance="through")),
    **_rows("Pad", OperatorRow("carry", moves.pad, constant="zero", keeps_zero=moves.pads_with_zeros)),
    **_rows("Shape", _carry(moves.shape, relevance="none")),
    **_rows(
        "QuantizeLinear DequantizeLinear com.microsoft.QuantizeLinear com.microsoft.DequantizeLinear",
        OperatorRow("quantise", constant="computed"),
    ),
    **_rows("DynamicQuantizeLinear", OperatorRow("range", constant="zero")),
}


# Operators whose channels are barriers, but through which relevance passes as their word says.
PASSING: Mapping[str, OperatorRow] = {
    **_rows("ai.onnx.ml.Scaler ai.onnx.ml.Imputer ai.onnx.ml.Binarizer ai.onnx.ml.Normalizer ai.onnx.ml.ZipMap", OperatorRow("mix")),
    **_rows("Attention", OperatorRow("mix", data=(0, 1, 2), relevance="attend")),
    **_rows(
        "RotaryEmbedding Trilu LRN MeanVarianceNormalization CastLike CumProd GatherElements ReverseSequence Compress CenterCropPad "
        "MaxRoiPool MaxUnpool BitShift BitwiseNot",
        OperatorRow("mix"),
    ),
    **_rows("RandomNormalLike RandomUniformLike EyeLike Size", OperatorRow("mix", relevance="none")),
    **_rows("TensorScatter", OperatorRow("mix", data=(0, 1), relevance="join")),
    **_rows("ScatterElements Scatter", OperatorRow("mix", data=(0, 2), relevance="join")),
}


def passing_row_of(node: onnx.NodeProto) -> OperatorRow | None:
    """How relevance passes a node; None: on evenly."""
    return row_of(node) or PASSING.get(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")


def row_of(node: onnx.NodeProto) -> OperatorRow | None:
    """The table's row for a node; None makes it a barrier."""
    return OPERATORS.get(node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}")
