"""Builds a rank's `Decoder` from a checkpoint: the one place where a `ModelSpec` turns into layers."""

import logging
from functools import partial

import torch
from torch import Tensor

from ..kernels.ops import HeadNorms, HeadSpec, NormWeight, Ops, Rotation
from ..parallel.comm import Comm, SoloComm
from ..parallel.linear import (
    Layer,
    column_linear,
    partial_linear,
    row_linear,
    table_lookup,
    then,
    vocab_embedding,
    vocab_linear,
)
from ..parallel.partition import cut_heads, cut_mlp, cut_vocab
from ..parallel.quant import LinearMethod
from ..parallel.stage import Embed, Head
from ..parallel.station import Station
from .checkpoint import Checkpoint
from .errors import ConfigError
from .models.decoder import Attention, Block, Decoder, Enter, ParallelBlock, SequentialBlock
from .models.fuse import LayerParts, LayerWeights, select_fuse
from .models.norms import EachHeadNorm, FullRMSNorm, HeadNorm, Norm, Normalise, add_only, normalised
from .models.pieces import Piece, down_pieces, out_pieces, qkv_pieces, up_pieces, vocab_pieces
from .models.rope import cos_sin_table
from .models.spec import LayerSpec, MLPSpec, ModelSpec, NormKind, QKNorm, RopeSpec
from .progress import Progress
from .share import MLP_UNIT
from .weights import WeightReader

log = logging.getLogger(__name__)

IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
"""Endings of buffers that older checkpoints carry: constants, not weights."""


def load_decoder(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    ops: Ops,
    dtype: torch.dtype,
    max_len: int | None = None,
    comm: Comm | None = None,
    layers: range | None = None,
    station: Station | None = None,
    show_progress: bool = True,
) -> Decoder:
    """One rank's decoder, on the device of `ops`, with progress on standard error.

    max_len: positions that will be asked for; default: the model's own. comm: the ranks that share each layer; default:
    none do. layers: this stage's, by global index; default: all. station: is told of every layer that is computed.

    Raises:
        CheckpointError: a tensor is missing, truncated, or not of the shape that the config implies.
        ConfigError: the model cannot be cut so, or has fewer positions than max_len.
    """
    comm = SoloComm() if comm is None else comm
    layers = range(spec.num_layers) if layers is None else layers
    reader = WeightReader(checkpoint, spec.names, ops=ops, dtype=dtype)
    builder = _Builder(spec, ops=ops, comm=comm, reader=reader, max_len=max_len or spec.max_len)
    with Progress(
        "Loading weights", total=len(layers) + 1, unit="parts", show=show_progress and comm.shard == 0
    ) as progress:
        blocks: list[Block] = []
        for index in layers:
            blocks.append(builder.block(index))
            progress.advance()
        entry, exit = builder.ends(first=layers.start == 0, last=layers.stop == spec.num_layers)
        progress.advance()
    _warn_of_unread(reader, spec, layers)
    return Decoder(
        spec,
        layers=layers,
        blocks=blocks,
        entry=entry,
        exit=exit,
        dtype=dtype,
        weight_bytes=reader.num_bytes,
        station=station,
    )


def _warn_of_unread(reader: WeightReader, spec: ModelSpec, layers: range) -> None:
    found = [name for index in layers for name in reader.unread(reader.prefix + spec.names.layer.format(index))]
    unread = [name for name in found if not name.endswith(IGNORED)]
    if unread:
        log.warning(
            "%d tensors of the checkpoint have no place in a %s model and are left out: %s%s",
            len(unread),
            spec.family,
            ", ".join(unread[:3]),
            ", ..." if len(unread) > 3 else "",
        )


class _Builder:
    """Puts layers together out of a rank's weights. What varies between models and ranks is decided here, once."""

    def __init__(self, spec: ModelSpec, *, ops: Ops, comm: Comm, reader: WeightReader, max_len: int) -> None:
        if spec.learned_positions and max_len > spec.max_len:
            raise ConfigError(
                f"max_model_len {max_len} is more than the {spec.max_len} positions the model has learned"
            )
        self._spec = spec
        self._ops = ops
        self._comm = comm
        self._reader = reader
        self._max_len = max_len
        try:
            self._heads = cut_heads(spec.num_heads, spec.num_kv_heads, shard=comm.shard, size=comm.size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._vocab = cut_vocab(spec.vocab_size, shard=comm.shard, size=comm.size)
        self._tables: dict[RopeSpec, Tensor] = {}
        self._fuse = select_fuse(ops, comm, dtype=reader.dtype)
        # A parallel block adds attention and MLP up before it asks the other ranks.
        self._row_linear = partial_linear if spec.parallel else row_linear

    def block(self, index: int) -> Block:
        """The layer of this global index."""
        names = self._spec.names
        layer = self._reader.prefix + names.layer.format(index)
        spec = self._spec.layers[index]
        weights = self._layer_weights(layer, spec.mlp)
        heads = HeadSpec(self._heads.num_query, self._heads.num_kv, self._head_norms(layer), self._rotation(spec.rope))
        attention = self._attention(layer, spec, weights, heads)
        mlp = self._finished(self._mlp(spec.mlp, weights), layer, names.after_mlp)
        norms = self._norm_before(layer, names.before_attention), self._norm_before(layer, names.before_mlp)
        before_attention = _entering(norms[0])
        if self._spec.parallel:
            return ParallelBlock(
                before_attention=before_attention,
                attention=attention,
                before_mlp=_beside_attention(norms[1]),
                mlp=mlp,
                comm=self._comm,
            )
        block = SequentialBlock(
            before_attention=before_attention, attention=attention, before_mlp=_entering(norms[1]), mlp=mlp
        )
        finished = names.after_attention or names.after_mlp or self._spec.residual_scale != 1.0
        if finished or (self._spec.qk_norm is not QKNorm.NONE and heads.norms is None):
            return block
        plain = _rms(norms[0]), _rms(norms[1])
        return self._fuse(block, LayerParts(plain, weights, heads, self._spec.head_dim, spec))

    # The parts of a block

    def _layer_weights(self, layer: str, mlp: MLPSpec) -> LayerWeights:
        model, names, heads = self._spec, self._spec.names, self._heads
        unit = max(self._reader.group(layer + names.down), MLP_UNIT)
        try:
            columns = cut_mlp(mlp.size, shard=self._comm.shard, size=self._comm.size, unit=unit)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        up = up_pieces(names, layer, mlp, hidden_size=model.hidden_size, columns=columns)
        down = down_pieces(names, layer, mlp, hidden_size=model.hidden_size, columns=columns)
        return LayerWeights(
            qkv=self._weights(qkv_pieces(model, layer, heads), bias=model.qkv_bias),
            out=self._weights(out_pieces(model, layer, heads), bias=model.out_bias),
            up=self._weights(up, bias=mlp.bias),
            down=self._weights(down, bias=mlp.bias),
        )

    def _attention(self, layer: str, spec: LayerSpec, weights: LayerWeights, heads: HeadSpec) -> Attention[Tensor]:
        model = self._spec
        qkv, normalise = column_linear(*weights.qkv), self._qk_norm(layer)
        if normalise is not None:
            sizes = {"num_query": heads.num_query, "num_kv": heads.num_kv, "head_dim": model.head_dim}
            qkv = normalised(qkv, normalise, **sizes)
        out = self._row_linear(*weights.out, comm=self._comm)
        return Attention(
            spec.attention,
            ops=self._ops,
            heads=heads,
            head_dim=model.head_dim,
            qkv=qkv,
            out=self._finished(out, layer, model.names.after_attention),
        )

    def _mlp(self, spec: MLPSpec, weights: LayerWeights) -> Layer:
        activate = partial(
            self._ops.gated_activation if spec.gated else self._ops.activation, activation=spec.activation
        )
        up_layer = column_linear(*weights.up)
        down_layer = self._row_linear(*weights.down, comm=self._comm)
        return lambda x_TD: down_layer(activate(up_layer(x_TD)))

    def _weights(self, pieces: list[Piece], *, bias: bool) -> tuple[LinearMethod, Tensor | None]:
        method = self._reader.linear(pieces, transposed=self._spec.names.transposed)
        return method, self._reader.bias(pieces) if bias else None

    def _rotation(self, rope: RopeSpec | None) -> Rotation | None:
        if rope is None:
            return None
        if rope not in self._tables:
            self._tables[rope] = cos_sin_table(rope, num_positions=self._max_len, device=self._ops.device)
        return Rotation(self._tables[rope], rope.interleaved)

    # Norms

    def _norm(self, module: str, size: int) -> Norm:
        spec = self._spec.norm
        weight = self._reader.norm_vector(f"{module}.weight", (size,), offset=spec.offset)
        bias = self._reader.norm_vector(f"{module}.bias", (size,)) if spec.bias else None
        return Norm(spec, ops=self._ops, weight_D=weight, bias_D=bias)

    def _norm_before(self, layer: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(layer + name, self._spec.hidden_size)

    def _finished(self, part: Layer, layer: str, name: str | None) -> Layer:
        """What a family does to a part's output before it is added to the residual."""
        if name is not None:
            part = then(part, self._norm(layer + name, self._spec.hidden_size).alone())
        scale = self._spec.residual_scale
        return part if scale == 1.0 else then(part, lambda x_TD: x_TD.mul_(scale))

    def _head_norms(self, layer: str) -> HeadNorms | None:
        """Norms of queries and keys that are part of `Ops.rotate_and_store`."""
        model = self._spec
        if model.qk_norm is not QKNorm.HEAD or model.norm.kind is not NormKind.RMS:
            return None
        q_weight_E, k_weight_E = (
            self._reader.norm_vector(f"{layer}{name}.weight", (model.head_dim,), offset=model.norm.offset)
            for name in (model.names.q_norm, model.names.k_norm)
        )
        return HeadNorms(q_weight_E, k_weight_E, model.norm.eps)

    def _qk_norm(self, layer: str) -> Normalise | None:
        """All others, which come before it."""
        model, heads = self._spec, self._heads
        q_name, k_name = layer + model.names.q_norm, layer + model.names.k_norm
        dim = model.head_dim
        if model.qk_norm is QKNorm.NONE or (model.qk_norm is QKNorm.HEAD and model.norm.kind is NormKind.RMS):
            return None
        if model.qk_norm is QKNorm.HEAD:
            return HeadNorm(self._norm(q_name, dim), self._norm(k_name, dim))
        if model.qk_norm is QKNorm.EACH_HEAD:
            return EachHeadNorm(
                model.norm,
                ops=self._ops,
                q_weight_HE=self._reader.norm_vector(f"{q_name}.weight", (model.num_heads, dim), cut=(heads.query,)),
                k_weight_KE=self._reader.norm_vector(f"{k_name}.weight", (model.num_kv_heads, dim), cut=(heads.kv,)),
            )
        totals = (model.num_heads * dim, model.num_kv_heads * dim)
        q_cut = slice(heads.query.start * dim, heads.query.stop * dim)
        k_cut = slice(heads.kv.start * dim, heads.kv.stop * dim)
        return FullRMSNorm(
            model.norm,
            comm=self._comm,
            q_weight_HE=self._reader.norm_vector(f"{q_name}.weight", totals[:1], cut=(q_cut,)).view(-1, dim),
            k_weight_KE=self._reader.norm_vector(f"{k_name}.weight", totals[1:], cut=(k_cut,)).view(-1, dim),
            totals=totals,
            copies=heads.copies,
        )

    # The ends

    def ends(self, *, first: bool, last: bool) -> tuple[Embed | None, Head | None]:
        """The entry of a first stage, the exit of a last one."""
        spec, reader = self._spec, self._reader
        embedding, head = self._vocabulary_modules()
        logits, shared_VD = reader.logits(vocab_pieces(spec, head, self._vocab)) if last else (None, None)
        exit = None if logits is None else self._exit(logits, head)
        if not first:
            return None, exit
        if head == embedding and shared_VD is not None:
            return self._entry(table_lookup(shared_VD)), exit
        return self._entry(reader.lookup(vocab_pieces(spec, embedding, self._vocab))), exit

    def _vocabulary_modules(self) -> tuple[str, str]:
        """Where embedding and head are stored: the same place if they are tied."""
        spec, reader = self._spec, self._reader
        embedding = reader.prefix + spec.names.embedding
        head = next((name for name in spec.names.heads if reader.has(name)), None)
        if not spec.tied:
            return embedding, head or spec.names.heads[0]  # reading what is absent gives the error
        if head is None:
            return embedding, embedding
        if not reader.has(embedding):
            return head, head
        # transformers, too, believes the tensors where they contradict the config.
        pieces = [vocab_pieces(spec, module, self._vocab)[0] for module in (embedding, head)]
        return (embedding, embedding) if reader.equal(*pieces) else (embedding, head)

    def _entry(self, lookup: Layer) -> Embed:
        spec, reader = self._spec, self._reader
        tokens = vocab_embedding(lookup, vocab_size=spec.vocab_size, comm=self._comm)
        # Rounded as the model was trained with it.
        scale = float(torch.tensor(spec.embedding_scale, dtype=reader.dtype))
        if spec.names.positions is None:
            return Embed(tokens, scale=scale)
        shape = (spec.max_len, spec.hidden_size)
        positions = Piece(reader.prefix + spec.names.positions, shape, slice(0, spec.max_len), slice(0, shape[1]))
        return Embed(tokens, positions_MD=reader.dense([positions]), scale=scale)

    def _exit(self, layer: Layer, head: str) -> Head:
        spec = self._spec
        bias = self._reader.bias(vocab_pieces(spec, head, self._vocab)) if spec.head_bias else None
        return Head(
            self._norm(self._reader.prefix + spec.names.final_norm, spec.hidden_size).alone(),
            vocab_linear(layer, bias),
            scale=spec.logit_scale,
            softcap=spec.logit_softcap,
        )


def _entering(norm: Norm | None) -> Enter:
    """What adds the former part's output to the residual and gives the next part's input."""
    return add_only if norm is None else norm.after_add()


def _beside_attention(norm: Norm | None) -> Enter:
    """A parallel block's MLP reads what its attention reads, or its own norm of the residual."""
    if norm is None:
        return lambda x_TD, _residual_TD: x_TD
    alone = norm.alone()
    return lambda x_TD, residual_TD: alone(residual_TD).to(x_TD.dtype)


def _rms(norm: Norm | None) -> NormWeight | None:
    return None if norm is None else norm.rms()
