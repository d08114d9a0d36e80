"""The device seam: every operation a model needs, as one Protocol. Chosen once per rank in `kernels/select.py`.

Shape letters, used here and wherever tensors meet:
    T  tokens of this step, all sequences one after the other     S  sequences of this step
    R  rows that sample (one a sequence, and one a guess)            V  vocabulary
    D  hidden                                                      F  MLP columns
    H  query heads     K  key/value heads     E  head dim          L  logprobs asked for, at most
    N  pages (KV blocks) of the whole cache   B  slots in a page   P  pages in a block-table row
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # who only reads a model's config waits for no torch
    from torch import Tensor, device, dtype


class Activation(Enum):
    """The non-linearity of an MLP; values are the names in `config.json`."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_pytorch_tanh"
    RELU = "relu"


@dataclass(frozen=True, slots=True, eq=False)
class KVLayer:
    """One layer's paged cache. A token lives at `page = slot // B`, `offset = slot % B`.

    Where the cache has 8-bit codes (`kv_codes.py`), a token's head is `codes * scale`, for keys and for values.
    """

    k_NKBE: Tensor
    v_NKBE: Tensor
    k_scale_NKB: Tensor | None = None  # float32; None: numbers are stored as they are
    v_scale_NKB: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """Keys, then values, as they are stored."""
        return iter((self.k_NKBE, self.v_NKBE))


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes, constant over steps.

    scale: multiplies q.k before the softmax.
    window: a token sees itself and the `window - 1` tokens before it; None: all before it.
    softcap: logits become `softcap * tanh(logits / softcap)`; None: unchanged.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class NormWeight(NamedTuple):
    """An RMS norm."""

    weight_D: Tensor  # float32
    eps: float


class HeadNorms(NamedTuple):
    """RMS norms of each query and each key head alone."""

    q_weight_E: Tensor  # float32, one for all heads
    k_weight_E: Tensor
    eps: float


class Rotation(NamedTuple):
    """Of the first C dims of every head, as pairs in the plane (rotary embedding, arXiv:2104.09864).

    cos_sin_MC: [positions, C] float32, C/2 cosines then C/2 sines. Pairs are (i, i + C/2), or (2i, 2i + 1) if
    `interleaved`.
    """

    cos_sin_MC: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True, eq=False)
class HeadSpec:
    """What a layer does to its fresh queries and keys, constant over steps: first the norms, then the rotation."""

    num_query: int
    num_kv: int
    norms: HeadNorms | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens attend to which pages in this step. Integers are int32 on the device; the rest is for the host.

    Sequences with one new token come first (`num_decodes` of them), then those with more: a mixed step runs the
    decode kernel over the first part and the prefill kernel over the second. A sequence with guesses is several, each a
    token longer, over the same pages. The new tokens' keys and values are already in the cache. Token j of a sequence
    with `q` new tokens and `kv` in all stands at `kv - q + j`.
    Rows of the block table are valid for `ceil(kv / B)` entries; what lies beyond is any valid page number.
    """

    query_start_S1: Tensor  # [S + 1] first token of each sequence, and T at the end
    kv_lens_S: Tensor  # [S] tokens of each sequence in the cache, this step's included
    block_table_SP: Tensor  # [S, P]
    num_decodes: int
    max_query_len: int
    max_kv_len: int
    query_lens: tuple[int, ...]  # host copies, so that plain-torch paths need no sync
    kv_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row samples. All tensors are on the device.

    temperature 0 means greedy; top_k 0, top_p 1 and min_p 0 mean off. Seeds and positions feed the counter-based noise:
    a row's token is a pure function of (logits, seed, position). What the host knows says what no row uses, so
    that whole passes are left out; it never changes a row's result.
    """

    temperature_R: Tensor  # float32
    top_k_R: Tensor  # int32
    top_p_R: Tensor  # float32
    min_p_R: Tensor  # float32
    seed_R: Tensor  # int64, any value
    position_R: Tensor  # int64, of the token that is being drawn, from the start of the prompt
    all_greedy: bool
    max_top_k: int  # of the rows that are not greedy; 0: none
    any_top_p: bool
    any_min_p: bool


class Logprobs(NamedTuple):
    """Natural-log probabilities of the raw distribution (before temperature, penalties and masks)."""

    chosen_R: Tensor  # float32, of the row's token
    rank_R: Tensor  # int64, 1 for the most likely token
    top_ids_RL: Tensor  # int64, most likely first
    top_logprobs_RL: Tensor  # float32


class Draw(NamedTuple):
    """What the columns of one shard of the vocabulary bring to a draw; the best score of all shards wins."""

    score_R: Tensor  # float32; +inf where the row is unusable, -inf where it has nothing left here
    token_R: Tensor  # int64, vocabulary id; anything where the score is not finite


class Ops(Protocol):
    """Operations on one device. Arguments marked in-place are overwritten; everything else is fresh or a view.

    Reductions are taken in float32 whatever the storage dtype. Weights of norms are float32, and so is the residual
    stream: what many layers add up in bfloat16 is off by several times the distance of near-tied logits.
    No method waits for the device.

    deterministic: a row's bits are a function of its own sequence: not of the rows beside it, of how many there are, of
    pages, or of whether its token was decoded or prefilled. Otherwise the number of rows may choose the order of sums.
    """

    device: device
    deterministic: bool

    def linear(self, x_TD: Tensor, weight_FD: Tensor, dtype: dtype | None = None, /) -> Tensor:
        """`kernels.linear.Linear`: `x @ W.T` for dense weights."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """`x / rms(x) * weight` over the last dim. Also used per head, on [T, H, E] with a weight of [E]."""
        ...

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        """`residual += x` in place (residual is float32), then the RMS norm of the sum in x's dtype."""
        ...

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor:
        """`(x - mean) / std * weight + bias` over the last dim."""
        ...

    def add_layer_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
    ) -> Tensor:
        """`residual += x` in place (residual is float32), then the layer norm of the sum in x's dtype."""
        ...

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        """`act(gate) * up` where gate is the first F columns and up the last: [T, F]."""
        ...

    def activation(self, x_TF: Tensor, activation: Activation) -> Tensor:
        """The non-linearity alone (MLPs without a gate)."""
        ...

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        """Store this step's keys and values at their slots (int64; no slot twice), in place in the cache.

        They are rounded to the cache's dtype, or encoded where it has scales. A slot of -1 stores nothing: padding rows
        of a captured graph.
        """
        ...

    def rotate_and_store(
        self, qkv_TNE: Tensor, cache: KVLayer, spec: HeadSpec, *, positions_T: Tensor, slots_T: Tensor
    ) -> Tensor:
        """Normalise, rotate and store a fused projection's heads at once; returns queries [T, H, E] for `attention`.

        qkv_TNE: H query heads, K key heads, K value heads, the last dim contiguous; may be overwritten. Means the same
        as `rms_norm` of each head, the rotation and `write_kv` one after the other, but may round once where they do
        twice.
        """
        ...

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of this step's tokens over their sequences' pages: [T, H, E] in q's dtype.

        H is a multiple of K (grouped queries): query head h reads key/value head h // (H / K).
        sinks_H: float32, a logit of each head that joins the softmax's sum and has no value; scale and softcap do not
        touch it (attention sinks, arXiv:2309.17453, learned as in gpt_oss).
        """
        ...

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """One token id a row, int64; -1 where the row holds a NaN or +inf, or no token is left.

        logits / temperature, then min-p, top-k and top-p as the common engines define them (each looks at what the
        former left), then `argmax(logits / temperature + gumbel(seed, position, id))`: see `kernels/noise.py`.
        Ties at a top-k or top-p border are all kept, and equal scores go to the lowest id, so the result does not
        depend on an order of sorting. Nor, on a CPU, does it on an order of summation: top-p's masses are integers
        (`reference.nucleus_masses`), as they are wherever the vocabulary is cut (`parallel/vocab.py`). A GPU that holds
        the vocabulary alone sums them in float32: a token within 1e-6 of the border may fall on its other side.
        """
        ...

    def draw(
        self, logits_RV: Tensor, sampling: SamplingBatch, *, first_id: int, threshold_R: Tensor | None = None
    ) -> Draw:
        """The last step of `sample` on columns that are the vocabulary's from `first_id` on; at least one column.

        threshold_R: float32, the smallest scaled logit that each row keeps, -inf for all; None: all rows keep all. The
        filters of `sampling` are not looked at. The best of the draws of all shards is what `sample` would give.
        """
        ...

    def logprobs(self, logits_RV: Tensor, tokens_R: Tensor, num: int) -> Logprobs:
        """Log-probabilities of the given tokens and of the `num` most likely ones (num may be 0)."""
        ...
