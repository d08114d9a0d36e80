"""Which parts of which stored matrices make up one layer of one rank: names and slices, no tensors.

A fused layer is a list of pieces, one under the other. All ways in which families store a layer end here.
"""

from dataclasses import dataclass

from ...parallel.partition import HeadCut
from .naming import Fusion, Names
from .spec import MLPSpec, ModelSpec


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows (outputs) and columns (inputs) of a matrix that is [out, in] = `shape` as a whole."""

    module: str
    shape: tuple[int, int]
    rows: slice
    cols: slice


def _rows(module: str, shape: tuple[int, int], rows: slice) -> Piece:
    return Piece(module, shape, rows, slice(0, shape[1]))


def _cols(module: str, shape: tuple[int, int], cols: slice) -> Piece:
    return Piece(module, shape, slice(0, shape[0]), cols)


def _shifted(part: slice, by: int, unit: int = 1) -> slice:
    """The slice in units, moved: (start + by) * unit to (stop + by) * unit."""
    return slice((part.start + by) * unit, (part.stop + by) * unit)


def qkv_pieces(spec: ModelSpec, layer: str, heads: HeadCut) -> list[Piece]:
    """This rank's queries, then its keys, then its values."""
    num_q, num_kv, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    modules = [layer + name for name in spec.names.qkv]
    width = spec.hidden_size
    if spec.names.qkv_fusion is Fusion.SEPARATE:
        totals, cuts = (num_q, num_kv, num_kv), (heads.query, heads.kv, heads.kv)
        return [
            _rows(module, (total * dim, width), _shifted(cut, 0, dim))
            for module, total, cut in zip(modules, totals, cuts, strict=True)
        ]
    shape = ((num_q + 2 * num_kv) * dim, width)
    if spec.names.qkv_fusion is Fusion.STACKED:
        placed = ((heads.query, 0), (heads.kv, num_q), (heads.kv, num_q + num_kv))
        return [_rows(modules[0], shape, _shifted(cut, by, dim)) for cut, by in placed]
    group = num_q // num_kv
    q_rows = [h // group * (group + 2) + h % group for h in range(heads.query.start, heads.query.stop)]
    k_rows = [h * (group + 2) + group for h in range(heads.kv.start, heads.kv.stop)]
    v_rows = [row + 1 for row in k_rows]
    return [_rows(modules[0], shape, slice(row * dim, (row + 1) * dim)) for row in q_rows + k_rows + v_rows]


def out_pieces(spec: ModelSpec, layer: str, heads: HeadCut) -> list[Piece]:
    """The attention's output projection: the columns that meet this rank's query heads."""
    shape = (spec.hidden_size, spec.num_heads * spec.head_dim)
    return [_cols(layer + spec.names.out, shape, _shifted(heads.query, 0, spec.head_dim))]


def up_pieces(names: Names, layer: str, mlp: MLPSpec, *, hidden_size: int, columns: slice) -> list[Piece]:
    """This rank's gate rows, if there is a gate, then its up rows."""
    modules = [layer + name for name in names.up]
    if not mlp.gated or len(modules) == 2:
        return [_rows(module, (mlp.size, hidden_size), columns) for module in modules]
    shape = (2 * mlp.size, hidden_size)
    return [_rows(modules[0], shape, columns), _rows(modules[0], shape, _shifted(columns, mlp.size))]


def down_pieces(names: Names, layer: str, mlp: MLPSpec, *, hidden_size: int, columns: slice) -> list[Piece]:
    """The MLP's output projection: the columns that meet this rank's part of the MLP."""
    return [_cols(layer + names.down, (hidden_size, mlp.size), columns)]


def vocab_pieces(spec: ModelSpec, module: str, part: slice) -> list[Piece]:
    """Rows of the embedding, or of the head."""
    return [_rows(module, (spec.vocab_size, spec.hidden_size), part)]
