"""Reads a rank's slices of the weights from a `Checkpoint` and holds them to the config's shapes."""

import logging
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..parallel.codes import Codes, Kind, Quantised, stack
from ..parallel.linear import Layer, cast_linear, float32_linear, table_lookup
from ..parallel.partition import length
from ..parallel.quant import CodeTable, DenseLinear, HalfLinear, LinearMethod, StackedLinear, select_kernels
from .checkpoint import Checkpoint, Cut, Form
from .errors import CheckpointError
from .models.naming import Names
from .models.pieces import Piece

log = logging.getLogger(__name__)

CHUNK = 1 << 24  # weights that are converted at once: bounds the memory beside the result


def find_prefix(checkpoint: Checkpoint, names: Names) -> str:
    """What stands before the base model's names: it depends on which class saved the checkpoint.

    Raises: CheckpointError where it holds no model of these names.
    """
    stored, first = frozenset(checkpoint.names()), names.layer.format(0)
    for prefix in names.prefixes:
        if f"{prefix}{names.embedding}.weight" in stored or f"{prefix}{first}{names.down}.weight" in stored:
            return prefix
    expected = f"{names.prefixes[0]}{names.embedding}.weight"
    raise CheckpointError(
        f"{checkpoint.file_of(expected)}: tensor {expected!r}: expected (with a prefix out of "
        f"{', '.join(repr(prefix) for prefix in names.prefixes)}), found {len(stored)} tensors of other names"
    )


class WeightReader:
    """One rank's view of a checkpoint: names completed, shapes checked, fused, converted and on the device."""

    def __init__(self, checkpoint: Checkpoint, names: Names, *, ops: Ops, dtype: torch.dtype) -> None:
        self.device = ops.device
        self._ops = ops
        self.dtype = dtype
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names())
        self._read: set[str] = set()
        self._kernels = select_kernels(self.device, dtype, deterministic=ops.deterministic)
        self._warned: set[str] = set()
        self._table: tuple[list[Piece], Layer] | None = None  # the head's rows, for an embedding that is tied to it
        self.prefix = find_prefix(checkpoint, names)

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self._names

    def unread(self, layer: str) -> list[str]:
        """Tensors of a layer that nothing asked for: the config may not be the checkpoint's."""
        return sorted(name for name in self._names if name.startswith(layer) and name not in self._read)

    def norm_vector(self, name: str, shape: tuple[int, ...], *, cut: Cut = (), offset: float = 0.0) -> Tensor:
        """A norm's weight or bias, float32 as the kernels want it."""
        self._check(name, shape)
        vector = self._slice(name, cut).to(torch.float32, copy=True).add_(offset).contiguous()
        return self._count(vector.to(self.device))

    def bias(self, pieces: Sequence[Piece]) -> Tensor:
        """The bias of a layer of pieces that lie one under the other."""
        parts = []
        for piece in pieces:
            name = f"{piece.module}.bias"
            self._check(name, piece.shape[:1])
            parts.append(self._slice(name, (piece.rows,)).to(self.dtype))
        return self._count(torch.cat(parts).to(self.device))

    def linear(self, pieces: Sequence[Piece], *, transposed: bool = False) -> LinearMethod:
        """A layer of pieces that lie one under the other: from codes where the device has a kernel, else dense."""
        if transposed:
            return self._dense_linear(pieces, transposed=True)
        parts = [part for run in self._runs(pieces) for part in self._packed_parts(run)]
        methods: list[LinearMethod] = []
        for is_dense, run in groupby(parts, lambda part: part[1] is None):
            if is_dense:
                methods.append(self._dequantised([piece for some, _ in run for piece in some]))
            else:
                methods += [method for _, method in run if method is not None]
        return methods[0] if len(methods) == 1 else StackedLinear(methods)

    def _runs(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """Neighbours that are stored alike, together."""
        return [list(run) for _, run in groupby(pieces, lambda piece: self._form(piece.module))]

    def _packed_parts(self, run: list[Piece]) -> list[tuple[list[Piece], LinearMethod | None]]:
        """The pieces with their method: one for all if there is one, as not for those in orders of their own."""
        method = self.packed(run)
        if method is not None or len(run) == 1:
            return [(run, method)]
        return [([piece], self.packed([piece])) for piece in run]

    def _form(self, module: str) -> Form | None:
        return self._checkpoint.form(f"{module}.weight") if self.has(module) else None

    def _dequantised(self, pieces: Sequence[Piece]) -> LinearMethod:
        for piece in pieces:
            form = self._form(piece.module)
            if form is not None and form.format not in self._warned:
                self._warned.add(form.format)
                log.warning(
                    "%s weights have no kernel here (%s, %s): they are held in %s",
                    form.format,
                    self.device.type,
                    piece.module,
                    str(self.dtype).removeprefix("torch."),
                )
        return self._dense_linear(pieces)

    def _dense_linear(self, pieces: Sequence[Piece], *, transposed: bool = False) -> LinearMethod:
        weight_FD = self.dense(pieces, transposed=transposed)
        return self._kernels.dense(weight_FD) or DenseLinear(weight_FD, self._ops.linear)

    def packed(self, pieces: Sequence[Piece]) -> LinearMethod | None:
        """A method over the pieces' codes; None if they have none, or if no kernel of the device takes them."""
        codes = self._codes(pieces)
        method = None if codes is None else self._kernels.make(codes)
        self.num_bytes += 0 if method is None else method.num_bytes()
        return method

    def _codes(self, pieces: Sequence[Piece]) -> Quantised | None:
        """Of all pieces, one under the other, if a kernel may take them."""
        found: list[Quantised] = []
        for piece in pieces:
            self._check_piece(piece, transposed=False)
            form = self._form(piece.module)
            if form is None or form.kind not in self._kernels.kinds:
                return None
            codes = self._checkpoint.codes(f"{piece.module}.weight", (piece.rows, piece.cols))
            if codes is None:
                return None
            found.append(codes)
        return stack(found)

    def logits(self, pieces: Sequence[Piece]) -> tuple[Layer, Tensor | None]:
        """The head, float32 -> float32, and its weight if that is dense and so may serve as embedding table, too."""
        on_cpu = self.device.type == "cpu"
        if on_cpu and (codes := self._codes(pieces)) is not None:
            layer = self._logits_from_codes(pieces, codes)
            if layer is not None:
                return layer, None
        weight_VD = self._dense(pieces, dtype=torch.float32 if on_cpu else self.dtype)
        if on_cpu and self.dtype != torch.float32 and HalfLinear.is_available():
            half = HalfLinear(weight_VD)
            self.num_bytes += half.num_bytes()
            return half.apply, None
        return float32_linear(self._count(weight_VD), self._ops.linear), weight_VD

    def _logits_from_codes(self, pieces: Sequence[Piece], codes: Quantised) -> Layer | None:
        head = self._kernels.head(codes)
        if head is not None:
            self.num_bytes += head.num_bytes()
            self._table = (list(pieces), head.lookup)
            return head.logits
        # Only 4 bits make up for logits that are rounded to the activations' dtype.
        method = self._kernels.make(codes) if codes.kind is Kind.INT4 else None
        if method is None:
            return None
        self.num_bytes += method.num_bytes()
        return cast_linear(method, self.dtype)

    def lookup(self, pieces: Sequence[Piece]) -> Layer:
        """An embedding table: ids [T] -> rows [T, D]. On a CPU it stays as codes where it is stored so."""
        if self._table is not None and self._table[0] == list(pieces):
            return self._table[1]
        if self.device.type == "cpu" and len(pieces) == 1:
            piece = pieces[0]
            self._check_piece(piece, transposed=False)
            codes = self._checkpoint.codes(f"{piece.module}.weight", (piece.rows, piece.cols))
            if isinstance(codes, Codes):
                table = CodeTable(codes)
                self.num_bytes += table.num_bytes()
                return table.lookup
        return table_lookup(self.dense(pieces))

    def dense(self, pieces: Sequence[Piece], *, transposed: bool = False) -> Tensor:
        """The pieces as one matrix [out, in] in the model's dtype."""
        return self._count(self._dense(pieces, dtype=self.dtype, transposed=transposed))

    def _dense(self, pieces: Sequence[Piece], *, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        rows = sum(length(piece.rows) for piece in pieces)
        cols = length(pieces[0].cols)
        weight = torch.empty(rows, cols, dtype=dtype, device=self.device)
        first = 0
        for piece in pieces:
            self._check_piece(piece, transposed=transposed)
            count = length(piece.rows)
            self._fill(weight[first : first + count], piece, transposed=transposed)
            first += count
        return weight

    def _fill(self, target: Tensor, piece: Piece, *, transposed: bool) -> None:
        step = max(1, CHUNK // max(target.shape[1], 1))
        name = f"{piece.module}.weight"
        for at in range(0, target.shape[0], step):
            part = target[at : at + step]
            rows = slice(piece.rows.start + at, piece.rows.start + at + part.shape[0])
            if transposed:
                part.copy_(self._slice(name, (piece.cols, rows)).T)
            else:
                part.copy_(self._slice(name, (rows, piece.cols)))

    def group(self, module: str) -> int:
        """Columns of a matrix that share a scale: they are best cut between groups. 1 for a dense matrix."""
        form = self._form(module)
        return 1 if form is None else form.group

    def equal(self, one: Piece, other: Piece) -> bool:
        """Whether two matrices hold the same numbers."""
        self._check_piece(one, transposed=False)
        self._check_piece(other, transposed=False)
        a, b = (self._slice(f"{piece.module}.weight", (piece.rows, piece.cols)) for piece in (one, other))
        return a.dtype == b.dtype and torch.equal(a, b)

    def _slice(self, name: str, cut: Cut) -> Tensor:
        tensor = self._checkpoint.tensor(name, cut)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:  # means nothing without scales
            raise CheckpointError(
                f"{self._checkpoint.file_of(name)}: tensor {name!r}: expected a dtype of 16 bits or more, "
                f"found {str(tensor.dtype).removeprefix('torch.')}"
            )
        return tensor

    def _check_piece(self, piece: Piece, *, transposed: bool) -> None:
        self._check(f"{piece.module}.weight", piece.shape[::-1] if transposed else piece.shape)

    def _check(self, name: str, expected: tuple[int, ...]) -> None:
        found = self._checkpoint.shape(name)
        if found != expected:
            raise CheckpointError(
                f"{self._checkpoint.file_of(name)}: tensor {name!r}: expected shape {list(expected)} by the config, "
                f"found {list(found)}"
            )
        self._read.add(name)

    def _count(self, tensor: Tensor) -> Tensor:
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor
