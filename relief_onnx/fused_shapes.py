"""How the fused operators of onnxruntime (domain com.microsoft) make sizes from sizes; ONNX's own inference does not know them."""

from __future__ import annotations

from relief_onnx.dims import Dim
from relief_onnx.shape_rules import SHAPE_RULES, ShapeRule
from relief_onnx.shape_scope import Dims, Step

__all__ = ["FUSED_RULES"]


def _same(step: Step) -> Dims | None:
    return step.dims()


def _with_sum(step: Step) -> list[Dims | None]:
    """The normalised tensor; the sum of the inputs is the fourth output. Statistics in between are only for training."""
    dims = step.dims()
    last = None if dims is None else (*dims[:-1], Dim.of(1))
    return [dims, last, last, dims]


def _embedded(step: Step) -> list[Dims | None]:
    ids, table = step.dims(0), step.dims(2)
    dims = None if ids is None or table is None else (*ids, table[-1])
    return [dims, None if ids is None else ids[:1], dims]


def _attention(step: Step) -> list[Dims | None]:
    """[batch, tokens, values]; what is handed on is [2, batch, heads, all tokens, size of a head]."""
    dims, weight, values = step.dims(0), step.dims(1), step.attributes
    if dims is None or len(dims) != 3 or (weight is not None and len(weight) != 2):
        return [None]
    sizes = values.get("qkv_hidden_sizes")
    width = Dim.of(sizes[2]) if sizes else None if weight is None else step.symbols.floor(weight[1], Dim.of(3))
    return [(*dims[:2], step.symbols.fresh() if width is None else width)]


def _heads(step: Step) -> list[Dims | None]:
    query, value = step.dims(0), step.dims(2)
    if query is None or len(query) != 3 or (value is not None and len(value) != 3):
        return [None]
    return [(*query[:2], step.symbols.fresh() if value is None else value[2])]


def _grouped(step: Step) -> list[Dims | None]:
    """As the queries; keys and values may be packed with them."""
    query, values = step.dims(0), step.attributes
    if query is None or len(query) != 3:
        return [None]
    if step.has(1):
        return [query]
    heads = values["num_heads"]
    return [(*query[:2], step.symbols.floor(query[2], Dim.of(heads + 2 * values["kv_num_heads"])) * Dim.of(heads))]


def _product(step: Step) -> Dims | None:
    """Batch axes meet; the first of them may stand where the rows are (transBatch)."""
    sides = []
    for slot, letter in enumerate("AB"):
        dims = step.dims(slot)
        if dims is None or len(dims) < 2:
            return None
        order = list(range(len(dims)))
        if step.attributes.get(f"transBatch{letter}", 0) and len(dims) > 2:
            order = [*order[1:-1], 0, order[-1]]
        if step.attributes.get(f"trans{letter}", 0):
            order[-2:] = order[-1], order[-2]
        sides.append([dims[axis] for axis in order])
    a, b = sides
    rank = max(len(a), len(b)) - 2
    pairs = zip([Dim.of(1)] * (rank - len(a) + 2) + a[:-2], [Dim.of(1)] * (rank - len(b) + 2) + b[:-2], strict=True)
    return (*(step.symbols.broadcast(one, other) for one, other in pairs), a[-2], b[-1])


FUSED_RULES: dict[str, ShapeRule] = {
    "SimplifiedLayerNormalization": _same,
    **{f"com.microsoft.{name}": _same for name in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "QuantizeLinear", "DequantizeLinear")},
    "com.microsoft.FusedConv": SHAPE_RULES["Conv"],
    "com.microsoft.FusedGemm": SHAPE_RULES["Gemm"],
    "com.microsoft.FusedMatMul": _product,
    "com.microsoft.SkipLayerNormalization": _with_sum,
    "com.microsoft.SkipSimplifiedLayerNormalization": _with_sum,
    "com.microsoft.EmbedLayerNormalization": _embedded,
    "com.microsoft.QEmbedLayerNormalization": _embedded,
    "com.microsoft.Attention": _attention,
    "com.microsoft.QAttention": _attention,
    "com.microsoft.MultiHeadAttention": _heads,
    "com.microsoft.GroupQueryAttention": _grouped,
}
