"""Reads a rank's slices of the weights from a `Checkpoint` and holds them to the config's shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..parallel.linear import Layer, cast_linear, float32_linear, table_lookup
from ..parallel.partition import length
from ..parallel.quant import BlockTable, DenseLinear, HalfLinear, LinearMethod, packed_linear
from .checkpoint import Checkpoint, Cut, PackedBlocks
from .errors import CheckpointError
from .models.naming import Names
from .models.pieces import Piece

CHUNK = 1 << 24  # weights that are converted at once: bounds the memory beside the result


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
        self.prefix = self._find_prefix(names)

    def _find_prefix(self, names: Names) -> str:
        """What stands before the base model's names: it depends on which class saved the checkpoint."""
        first = names.layer.format(0)
        for prefix in names.prefixes:
            if (
                f"{prefix}{names.embedding}.weight" in self._names
                or f"{prefix}{first}{names.down}.weight" in self._names
            ):
                return prefix
        expected = f"{names.prefixes[0]}{names.embedding}.weight"
        raise CheckpointError(
            f"{self._checkpoint.file_of(expected)}: tensor {expected!r}: expected (with a prefix out of "
            f"{', '.join(repr(prefix) for prefix in names.prefixes)}), found {len(self._names)} tensors of other names"
        )

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
        """A layer of pieces that lie one under the other: as the file's blocks if a kernel takes them, else dense."""
        if transposed:
            return DenseLinear(self.dense(pieces, transposed=True), self._ops.linear)
        return self.packed(pieces) or DenseLinear(self.dense(pieces), self._ops.linear)

    def packed(self, pieces: Sequence[Piece]) -> LinearMethod | None:
        """The pieces as the file's own blocks; None if they are not, or if no kernel takes them."""
        found: list[PackedBlocks] = []
        for piece in pieces:
            self._check_piece(piece, transposed=False)
            blocks = self._checkpoint.blocks(f"{piece.module}.weight", (piece.rows, piece.cols))
            if blocks is None or (found and blocks.format != found[0].format):
                return None
            found.append(blocks)
        method = packed_linear(
            found[0].format,
            [blocks.data for blocks in found],
            in_features=length(pieces[0].cols),
            device=self.device,
            dtype=self.dtype,
            deterministic=self._ops.deterministic,
        )
        self.num_bytes += method.num_bytes() if method else 0
        return method

    def logits(self, pieces: Sequence[Piece]) -> tuple[Layer, Tensor | None]:
        """The head, float32 -> float32, and its weight if that is dense and so may serve as embedding table, too."""
        packed = self.packed(pieces)
        if packed is not None:
            return cast_linear(packed, self.dtype), None
        on_cpu = self.device.type == "cpu"
        weight_VD = self._dense(pieces, dtype=torch.float32 if on_cpu else self.dtype)
        if on_cpu and self.dtype != torch.float32 and HalfLinear.is_available():
            half = HalfLinear(weight_VD)
            self.num_bytes += half.num_bytes()
            return half.apply, None
        return float32_linear(self._count(weight_VD), self._ops.linear), weight_VD

    def lookup(self, pieces: Sequence[Piece]) -> Layer:
        """An embedding table: ids [T] -> rows [T, D]. On a CPU the file's own blocks serve where they can."""
        if self.device.type == "cpu" and len(pieces) == 1:
            piece = pieces[0]
            self._check_piece(piece, transposed=False)
            blocks = self._checkpoint.blocks(f"{piece.module}.weight", (piece.rows, piece.cols))
            if blocks is not None and BlockTable.reads(blocks.format):
                table = BlockTable(blocks.format, blocks.data)
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

    def block_len(self, module: str) -> int:
        """Weights of a row that share a scale: rows are best cut between them. 1 for a dense matrix."""
        blocks = self._checkpoint.blocks(f"{module}.weight", (slice(0, 1),)) if self.has(module) else None
        return 1 if blocks is None else blocks.block_len

    def equal(self, one: Piece, other: Piece) -> bool:
        """Whether two matrices hold the same numbers."""
        self._check_piece(one, transposed=False)
        self._check_piece(other, transposed=False)
        a, b = (self._slice(f"{piece.module}.weight", (piece.rows, piece.cols)) for piece in (one, other))
        return a.dtype == b.dtype and torch.equal(a, b)

    def _slice(self, name: str, cut: Cut) -> Tensor:
        tensor = self._checkpoint.tensor(name, cut)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:  # quantised: means nothing without scales
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
