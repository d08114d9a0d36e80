"""What a rank's weights will take of its device, worked out from names and shapes before anything is read.

It goes over the very pieces that the loader asks for, so a plan and what is loaded agree: to the byte where matrices
are dense, nearly so where they stay codes. What a checkpoint stores as what is asked of `Stored`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..parallel.codes import UNIT, Kind
from ..parallel.partition import cut_vocab, length
from ..parallel.quant import HalfLinear, kernel_kinds
from .checkpoint import Checkpoint, Form
from .models.naming import Names
from .models.pieces import Piece, down_pieces, out_pieces, qkv_pieces, up_pieces
from .models.spec import ModelSpec, NormKind, QKNorm
from .share import Share
from .weights import find_prefix

_NORM_BYTES = 4  # float32, as the kernels want them
_SCALE_BITS = 32  # of a group: a float32, or a scale and a zero point of 16 bits
_CPU_GROUP = UNIT  # our CPU kernels keep the scales of 4-bit codes for so many columns


class Stored(Protocol):
    """How a checkpoint stores the matrices of modules; names are full ones, without `.weight`."""

    prefix: str
    """Of the base model's names."""

    def has(self, module: str) -> bool:
        """Whether there is such a matrix."""
        ...

    def form(self, module: str) -> Form | None:
        """How it is quantised; None: it is dense."""
        ...


class StoredIn:
    """What a checkpoint says of itself. Raises: CheckpointError where it holds no model of these names."""

    def __init__(self, checkpoint: Checkpoint, names: Names) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        self.prefix = find_prefix(checkpoint, names)

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self._names

    def form(self, module: str) -> Form | None:
        return self._checkpoint.form(f"{module}.weight") if self.has(module) else None


class StoredAs:
    """Weights that nobody has yet: every matrix of the layers in one form, the vocabulary dense."""

    def __init__(self, spec: ModelSpec, form: Form | None) -> None:
        self.prefix = spec.names.prefixes[0]
        self._ends = {self.prefix + spec.names.embedding, *(() if spec.tied else spec.names.heads[:1])}
        self._form = form

    def has(self, module: str) -> bool:
        return True

    def form(self, module: str) -> Form | None:
        return None if module in self._ends else self._form


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Bytes of one rank's weights.

    layers: of each of its layers. read: what a step of one token reads of all this, an embedding's rows aside.
    has_codes: some stay codes, whose products take memory of their own.
    """

    layers: tuple[int, ...]
    embedding: int
    head: int
    read: int
    has_codes: bool

    @property
    def total(self) -> int:
        return sum(self.layers) + self.embedding + self.head


def plan_weights(share: Share, stored: Stored, *, device: str, dtype: torch.dtype) -> WeightPlan:
    """What `share` will take on a device of this type ("cuda", "cpu"), where activations are of `dtype`."""
    return _Planner(share, stored, device, dtype).plan()


class _Planner:
    def __init__(self, share: Share, stored: Stored, device: str, dtype: torch.dtype) -> None:
        self._share, self._spec, self._stored = share, share.spec, stored
        self._device, self._dtype = device, dtype
        self._kinds = kernel_kinds(device, dtype)
        self._has_codes = False

    def plan(self) -> WeightPlan:
        layers = tuple(self._layer(index) for index in self._share.layers)
        embedding, head = self._ends()
        read = sum(layers) + (head or embedding if self._share.place.is_last else 0)
        return WeightPlan(layers, embedding, head, read, self._has_codes)

    def _layer(self, index: int) -> int:
        share, spec = self._share, self._spec
        layer = self._stored.prefix + spec.names.layer.format(index)
        form = self._stored.form(layer + spec.names.down)
        columns = share.mlp_columns(index, group=1 if form is None else form.group)
        mlp, names = spec.layers[index].mlp, spec.names
        pieces = [
            *qkv_pieces(spec, layer, share.heads),
            *out_pieces(spec, layer, share.heads),
            *up_pieces(names, layer, mlp, hidden_size=spec.hidden_size, columns=columns),
            *down_pieces(names, layer, mlp, hidden_size=spec.hidden_size, columns=columns),
        ]
        return sum(map(self._piece, pieces)) + _small_bytes(share, index, length(columns), self._dtype)

    def _piece(self, piece: Piece) -> int:
        rows, columns = length(piece.rows), length(piece.cols)
        return self._bytes(rows * columns, columns, self._stored.form(piece.module))

    def _bytes(self, num_weights: int, columns: int, form: Form | None) -> int:
        """Of a matrix with so many columns."""
        if form is None or form.kind not in self._kinds or (form.has_zeros and self._device != "cpu"):
            return num_weights * self._dtype.itemsize
        self._has_codes = True
        return int(num_weights * _bits(form, columns, self._device) / 8)

    def _ends(self) -> tuple[int, int]:
        """Embedding, and head: 0 where the embedding's memory serves for both."""
        share, spec = self._share, self._spec
        place = share.place
        num = length(cut_vocab(spec.vocab_size, shard=place.shard, size=place.grid.tp)) * spec.hidden_size
        shared, head_bytes, table_bytes = self._vocabulary(num)
        embedding = table_bytes if place.is_first else 0
        if place.is_first and spec.learned_positions:
            embedding += spec.max_len * spec.hidden_size * self._dtype.itemsize
        if not place.is_last:
            return embedding, 0
        final = spec.hidden_size * _NORM_BYTES * (2 if spec.norm.bias else 1)
        final += num // spec.hidden_size * self._dtype.itemsize if spec.head_bias else 0
        if shared and place.is_first:
            return embedding + final, 0
        return embedding, head_bytes + final

    def _vocabulary(self, num: int) -> tuple[bool, int, int]:
        """Of so many weights: (whether one memory serves both ends), the head's bytes, and the table's."""
        spec, stored = self._spec, self._stored
        embedding = stored.prefix + spec.names.embedding
        head = next((name for name in spec.names.heads if stored.has(name)), embedding)
        tied = spec.tied or head == embedding
        dense = num * self._dtype.itemsize
        if self._device != "cpu" or (self._dtype is torch.float32):
            return tied, dense, dense
        form = stored.form(embedding if tied else head)
        table = stored.form(embedding)
        table_bytes = dense if table is None or table.kind is None else self._bytes(num, spec.hidden_size, table)
        if form is not None and form.kind in self._kinds and not form.has_zeros:
            return tied and form.kind is Kind.INT8, self._bytes(num, spec.hidden_size, form), table_bytes
        halved = HalfLinear.is_available()  # a copy of its own, in 16 bits; else one in float32
        return tied and not halved, num * (2 if halved else 4), num * 4 if tied and not halved else table_bytes


def _bits(form: Form, columns: int, device: str) -> float:
    """Of a weight that stays a code, its part of what a group shares included: of all columns where that is 1."""
    group = columns if form.group == 1 else min(form.group, columns)
    if form.kind is Kind.INT4:
        return 4 + _SCALE_BITS / (_CPU_GROUP if device == "cpu" else group)
    return 8 + (2 if form.has_zeros else 1) * _SCALE_BITS / group


def _small_bytes(share: Share, index: int, mlp_columns: int, dtype: torch.dtype) -> int:
    """Norms and biases of a layer."""
    spec, heads = share.spec, share.heads
    norm_vectors = 2 if spec.norm.bias else 1
    names = spec.names
    around = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
    norms = sum(name is not None for name in around) * spec.hidden_size * norm_vectors
    norms += sum(_qk_norm_sizes(share)) * (norm_vectors if spec.norm.kind is NormKind.LAYER else 1)
    mlp = spec.layers[index].mlp
    biases = (heads.num_query + 2 * heads.num_kv) * spec.head_dim if spec.qkv_bias else 0
    biases += spec.hidden_size if spec.out_bias else 0
    biases += mlp_columns * (2 if mlp.gated else 1) + spec.hidden_size if mlp.bias else 0
    return norms * _NORM_BYTES + biases * dtype.itemsize


def _qk_norm_sizes(share: Share) -> Sequence[int]:
    spec, heads = share.spec, share.heads
    if spec.qk_norm is QKNorm.NONE:
        return ()
    if spec.qk_norm is QKNorm.HEAD:
        return (spec.head_dim, spec.head_dim)
    return (heads.num_query * spec.head_dim, heads.num_kv * spec.head_dim)
