"""`ReferenceOps`: every operation of `ops.py` in the plainest torch there is. The oracle of all kernel tests.

Nothing here is fast. Everything is computed in float32 and rounded once, at the end. It runs on any device, in which
case it may wait for it: only the other implementations keep the promise of never doing so.

The steps of sampling and attention are functions of their own, so that an implementation can replace one and keep the
rest.
"""

import torch
from torch import Tensor, device
from torch.nn import functional

from . import noise
from .kv_codes import decode, encode
from .linear import linear
from .ops import Activation, AttentionBatch, AttentionSpec, Draw, HeadSpec, KVLayer, Logprobs, SamplingBatch


class ReferenceOps:
    """`Ops` in plain torch."""

    deterministic = False

    def __init__(self, on: device) -> None:
        self.device = on

    def linear(self, x_TD: Tensor, weight_FD: Tensor, dtype: torch.dtype | None = None, /) -> Tensor:
        return linear(x_TD, weight_FD, dtype)

    # Norms

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        x = x_TD.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()).to(x_TD.dtype)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        residual_TD.add_(x_TD)
        return self.rms_norm(residual_TD, weight_D, eps=eps).to(x_TD.dtype)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor:
        x = x_TD.float()
        x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()
        return (y if bias_D is None else y + bias_D.float()).to(x_TD.dtype)

    def add_layer_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
    ) -> Tensor:
        residual_TD.add_(x_TD)
        return self.layer_norm(residual_TD, weight_D, bias_D, eps=eps).to(x_TD.dtype)

    # Rotary embedding

    def rope(self, q_THE: Tensor, k_TKE: Tensor, positions_T: Tensor, cos_sin_MC: Tensor, *, interleaved: bool) -> None:
        """Rotate the first C dims of every head of q and k, in place (rotary embedding, arXiv:2104.09864).

        cos_sin_MC: see `Rotation`. q and k may be strided views (of a fused QKV output) with the last dim contiguous.
        """
        dims = cos_sin_MC.shape[1]
        cos_T1c, sin_T1c = cos_sin_MC[positions_T.long()].float()[:, None, :].chunk(2, dim=-1)
        for x in (q_THE, k_TKE):
            first, second = _pairs(x[..., :dims], interleaved=interleaved)
            a, b = first.float(), second.float()
            # Both before either is stored: in float32, a and b are views of x itself.
            rotated_a, rotated_b = a * cos_T1c - b * sin_T1c, b * cos_T1c + a * sin_T1c
            first.copy_(rotated_a)
            second.copy_(rotated_b)

    # MLP

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        gate, up = gate_up_T2F.float().chunk(2, dim=-1)
        return (apply_activation(gate, activation) * up).to(gate_up_T2F.dtype)

    def activation(self, x_TF: Tensor, activation: Activation) -> Tensor:
        return apply_activation(x_TF.float(), activation).to(x_TF.dtype)

    # Paged cache and attention

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        page_size = cache.k_NKBE.shape[2]
        stored = slots_T >= 0
        slots = slots_T[stored].long()
        pages, offsets = slots // page_size, slots % page_size
        # Two index tensors around a slice put the indexed dim first: [stored, K, E], as k and v are.
        at = (pages, slice(None), offsets)
        store(k_TKE[stored], cache.k_NKBE, cache.k_scale_NKB, at)
        store(v_TKE[stored], cache.v_NKBE, cache.v_scale_NKB, at)

    def rotate_and_store(
        self, qkv_TNE: Tensor, cache: KVLayer, spec: HeadSpec, *, positions_T: Tensor, slots_T: Tensor
    ) -> Tensor:
        q_THE, k_TKE, v_TKE = qkv_TNE.split_with_sizes((spec.num_query, spec.num_kv, spec.num_kv), dim=1)
        if spec.norms is not None:
            q_THE = self.rms_norm(q_THE, spec.norms.q_weight_E, eps=spec.norms.eps)
            k_TKE = self.rms_norm(k_TKE, spec.norms.k_weight_E, eps=spec.norms.eps)
        if spec.rotation is not None:
            cos_sin_MC, interleaved = spec.rotation
            self.rope(q_THE, k_TKE, positions_T, cos_sin_MC, interleaved=interleaved)
        self.write_kv(k_TKE, v_TKE, cache, slots_T)
        return q_THE

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        out_THE = torch.zeros(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        start = 0
        for row_P, query_len, kv_len in zip(batch.block_table_SP, batch.query_lens, batch.kv_lens, strict=True):
            end = start + query_len
            if query_len and kv_len:  # a padding row of a captured graph has no tokens: zeros
                keys_KnE, values_KnE = gather_pages(cache, row_P, kv_len)
                out_QHE = attend(q_THE[start:end], keys_KnE, values_KnE, spec, sinks_H=sinks_H)
                out_THE[start:end] = out_QHE.to(q_THE.dtype)
            start = end
        return out_THE

    # Sampling

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        logits = logits_RV.float()
        drawn = logits
        if not sampling.all_greedy:
            drawn = self.filter(scale_by_temperature(logits, sampling.temperature_R), sampling)
        return chosen_tokens(best_scores(logits, drawn, sampling, first_id=0))

    def draw(
        self, logits_RV: Tensor, sampling: SamplingBatch, *, first_id: int, threshold_R: Tensor | None = None
    ) -> Draw:
        logits = logits_RV.float()
        drawn = logits
        if not sampling.all_greedy:
            drawn = scale_by_temperature(logits, sampling.temperature_R)
            if threshold_R is not None:
                drawn = drawn.masked_fill(drawn < threshold_R[:, None], float("-inf"))
        return best_scores(logits, drawn, sampling, first_id=first_id)

    def filter(self, scaled_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        """Logits with -inf for the tokens that min-p, top-k and top-p leave out, one after the other."""
        if sampling.any_min_p:
            scaled_RV = filter_min_p(scaled_RV, sampling.min_p_R)
        if sampling.max_top_k:
            scaled_RV = filter_top_k(scaled_RV, sampling.top_k_R)
        if sampling.any_top_p:
            scaled_RV = filter_top_p(scaled_RV, sampling.top_p_R)
        return scaled_RV

    def logprobs(self, logits_RV: Tensor, tokens_R: Tensor, num: int) -> Logprobs:
        logits_RV = logits_RV.float()
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        # A row that could not be sampled has token -1; what it gets here means nothing, but must not fault.
        tokens_R1 = tokens_R.long().clamp(min=0)[:, None]
        chosen_R = logprobs_RV.gather(1, tokens_R1)[:, 0]
        rank_R = 1 + (logits_RV > logits_RV.gather(1, tokens_R1)).sum(dim=-1)
        top = logprobs_RV.topk(min(num, logits_RV.shape[1]), dim=-1)
        return Logprobs(chosen_R, rank_R, top.indices, top.values)


def _pairs(x: Tensor, *, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and second members of the rotated pairs."""
    half = x.shape[-1] // 2
    return (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def apply_activation(x: Tensor, activation: Activation) -> Tensor:
    """The non-linearity in x's own dtype."""
    match activation:
        case Activation.SILU:
            return functional.silu(x)
        case Activation.GELU:
            return functional.gelu(x)
        case Activation.GELU_TANH:
            return functional.gelu(x, approximate="tanh")
        case Activation.RELU:
            return functional.relu(x)


def store(new_nKE: Tensor, paged_NKBE: Tensor, scale_NKB: Tensor | None, at: tuple[Tensor, slice, Tensor]) -> None:
    """Put keys, or values, in their places, encoded where there are scales."""
    if scale_NKB is None:
        paged_NKBE[at] = new_nKE.to(paged_NKBE.dtype)
    else:
        paged_NKBE[at], scale_NKB[at] = encode(new_nKE, paged_NKBE.dtype)


def gather_pages(cache: KVLayer, block_row_P: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """The first `kv_len` keys and values of a sequence, in order: [K, kv_len, E], in the cache's dtype or decoded."""
    page_size = cache.k_NKBE.shape[2]
    pages = block_row_P[: -(-kv_len // page_size)].long()

    def in_order(paged_NKBE: Tensor, scale_NKB: Tensor | None) -> Tensor:
        found_PKBE = decode(paged_NKBE[pages], None if scale_NKB is None else scale_NKB[pages])
        return found_PKBE.transpose(0, 1).flatten(1, 2)[:, :kv_len]

    return in_order(cache.k_NKBE, cache.k_scale_NKB), in_order(cache.v_NKBE, cache.v_scale_NKB)


def attend(
    q_QHE: Tensor, k_KnE: Tensor, v_KnE: Tensor, spec: AttentionSpec, *, sinks_H: Tensor | None = None
) -> Tensor:
    """Attention of the last Q of n tokens over all n: [Q, H, E] in float32."""
    num_queries, heads = q_QHE.shape[:2]
    kv_heads, num_keys = k_KnE.shape[:2]
    k_HnE = k_KnE.float().repeat_interleave(heads // kv_heads, dim=0)
    v_HnE = v_KnE.float().repeat_interleave(heads // kv_heads, dim=0)
    logits_HQn = q_QHE.float().transpose(0, 1) @ k_HnE.transpose(1, 2) * spec.scale
    if spec.softcap is not None:
        logits_HQn = spec.softcap * torch.tanh(logits_HQn / spec.softcap)
    visible_Qn = visible_keys(num_queries, num_keys, spec.window, q_QHE.device)
    logits_HQn = logits_HQn.masked_fill(~visible_Qn, float("-inf"))
    if sinks_H is not None:  # one more key, whose value is zero
        logits_HQn = torch.cat((logits_HQn, sinks_H.float()[:, None, None].expand(-1, num_queries, 1)), dim=-1)
    weights_HQn = logits_HQn.softmax(dim=-1)[..., :num_keys]
    return (weights_HQn @ v_HnE).transpose(0, 1)


def visible_keys(num_queries: int, num_keys: int, window: int | None, on: device) -> Tensor:
    """[Q, n], true where the query (the last Q tokens of n) sees the key."""
    keys = torch.arange(num_keys, device=on)
    queries = keys[num_keys - num_queries :, None]
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def best_scores(logits_RV: Tensor, drawn_RV: Tensor, sampling: SamplingBatch, *, first_id: int) -> Draw:
    """Of logits, and of the same as rows that are not greedy take them: scaled, and -inf for what they leave out."""
    scores_RV = logits_RV
    if not sampling.all_greedy:
        keys = noise.row_keys(sampling.seed_R, sampling.position_R)
        ids = torch.arange(first_id, first_id + logits_RV.shape[1], dtype=torch.int32, device=logits_RV.device)
        noised_RV = drawn_RV + noise.gumbel(*keys, ids)
        scores_RV = torch.where(sampling.temperature_R[:, None] > 0, noised_RV, logits_RV)
    score_R, column_R = scores_RV.max(dim=-1)
    highest_R = logits_RV.amax(dim=-1)  # a NaN is its row's maximum
    return Draw(score_R.masked_fill(~(highest_R < float("inf")), float("inf")), first_id + column_R)


def chosen_tokens(draw: Draw) -> Tensor:
    """[R] the ids; -1 where the score is not finite."""
    return draw.token_R.masked_fill(~draw.score_R.isfinite(), -1)


def scale_by_temperature(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """logits / temperature; greedy rows (temperature 0) stay as they are. What overflows is the largest float."""
    scaled_RV = logits_RV / torch.where(temperature_R > 0, temperature_R, 1.0)[:, None]
    return scaled_RV.clamp_(max=torch.finfo(torch.float32).max)


def filter_min_p(logits_RV: Tensor, min_p_R: Tensor) -> Tensor:
    """Keep the tokens at least `min_p` times as likely as the likeliest (arXiv:2407.01082)."""
    threshold_R1 = logits_RV.amax(dim=-1, keepdim=True) + torch.log(min_p_R)[:, None]
    return logits_RV.masked_fill(logits_RV < threshold_R1, float("-inf"))


def filter_top_k(logits_RV: Tensor, top_k_R: Tensor) -> Tensor:
    """Keep the k likeliest tokens and all that equal the k-th; 0 keeps all."""
    vocab = logits_RV.shape[1]
    kept_R1 = torch.where(top_k_R > 0, top_k_R, vocab).clamp(max=vocab).long()[:, None]
    threshold_R1 = logits_RV.sort(dim=-1, descending=True).values.gather(1, kept_R1 - 1)
    return logits_RV.masked_fill(logits_RV < threshold_R1, float("-inf"))


def filter_top_p(logits_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Keep the fewest likeliest tokens whose mass reaches `top_p`, and all that equal the last (arXiv:1904.09751).

    At least one token is kept; 1 (or more) keeps all.
    """
    sorted_RV = logits_RV.sort(dim=-1, descending=True).values
    masses_RV = nucleus_masses(sorted_RV, sorted_RV[:, :1])
    need_R = nucleus_need(masses_RV.sum(dim=-1), top_p_R)
    before_RV = masses_RV.cumsum(dim=-1) - masses_RV
    kept_R1 = (before_RV < need_R[:, None]).sum(dim=-1, keepdim=True).clamp(min=1)
    threshold_R1 = sorted_RV.gather(1, kept_R1 - 1)
    return logits_RV.masked_fill((logits_RV < threshold_R1) & (top_p_R[:, None] < 1), float("-inf"))


MASS_ONE = 1 << 40
"""What the likeliest token weighs. Half a million times that is far from the end of int64."""


def nucleus_masses(logits_RV: Tensor, highest_R1: Tensor) -> Tensor:
    """exp(logit - highest) in fixed point, int64: sums are exact, so they are the same in any order and over any cut.

    A token 28.4 below the likeliest weighs nothing; what rounding loses of a whole vocabulary is less than 1e-6.
    """
    return (logits_RV.double() - highest_R1.double()).exp_().mul_(MASS_ONE).round_().long()


def nucleus_need(total_R: Tensor, top_p_R: Tensor) -> Tensor:
    """The mass that a nucleus must reach: `top_p` of the total, and more than nothing. int64."""
    return (total_R.double() * top_p_R.double()).ceil().clamp_(min=1).long()
