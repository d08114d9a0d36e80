"""`TritonOps`: `Ops` on a CUDA device. Each method is a launch; the kernels lie beside, one file a kind.

With TRITON_INTERPRET=1 set before Triton is imported, the same kernels run on CPU tensors (that is how they are tested
without a GPU). The rank must have made its device the current one.
"""

import torch
from torch import Tensor, device

from .activation import activate
from .decode_attention import DecodeWorkspace, decode_attention
from .kv_write import write_kv
from .linear import linear
from .matmul import matmul
from .norm import norm
from .ops import Activation, AttentionBatch, AttentionSpec, Draw, HeadSpec, KVLayer, Logprobs, SamplingBatch
from .prefill_attention import prefill_attention
from .rotate_and_store import rotate_and_store
from .sampling import chosen_logprobs, draw, sample

# Programs of a kernel that hold a multiprocessor's worth of work and do not wait for one another.
_PROGRAMS_PER_PROCESSOR = 2
_INTERPRETED_PROCESSORS = 8


class TritonOps:
    """`Ops` as Triton kernels.

    deterministic: a row's result depends on its own sequence alone, not on what else is in the step nor on whether its
    token was decoded or prefilled. Decodes then run as prefills of one token, at a cost in long contexts, and products
    in one tile whatever the number of rows.
    """

    def __init__(self, on: device, *, deterministic: bool = False) -> None:
        self.device = on
        self.deterministic = deterministic
        self.linear = matmul if deterministic else linear
        processors = _INTERPRETED_PROCESSORS
        if on.type == "cuda":
            processors = torch.cuda.get_device_properties(on).multi_processor_count
        self._decode_workspace = DecodeWorkspace(on, processors * _PROGRAMS_PER_PROCESSOR)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        return norm(x_TD, weight_D, eps=eps, centred=False)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
        return norm(x_TD, weight_D, residual=residual_TD, eps=eps, centred=False)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float) -> Tensor:
        return norm(x_TD, weight_D, bias_D, eps=eps, centred=True)

    def add_layer_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, *, eps: float
    ) -> Tensor:
        return norm(x_TD, weight_D, bias_D, residual=residual_TD, eps=eps, centred=True)

    def gated_activation(self, gate_up_T2F: Tensor, activation: Activation) -> Tensor:
        return activate(gate_up_T2F, activation, gated=True)

    def activation(self, x_TF: Tensor, activation: Activation) -> Tensor:
        return activate(x_TF, activation, gated=False)

    def write_kv(self, k_TKE: Tensor, v_TKE: Tensor, cache: KVLayer, slots_T: Tensor) -> None:
        write_kv(k_TKE, v_TKE, cache, slots_T)

    def rotate_and_store(
        self, qkv_TNE: Tensor, cache: KVLayer, spec: HeadSpec, *, positions_T: Tensor, slots_T: Tensor
    ) -> Tensor:
        return rotate_and_store(qkv_TNE, cache, spec, positions_T=positions_T, slots_T=slots_T)

    def attention(
        self,
        q_THE: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        *,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        decodes = 0 if self.deterministic else batch.num_decodes
        if decodes:
            workspace = self._decode_workspace
            decode_attention(q_THE, cache, batch, spec, sinks_H=sinks_H, out_THE=out_THE, workspace=workspace)
        if batch.block_table_SP.shape[0] > decodes:
            prefill_attention(q_THE, cache, batch, spec, sinks_H=sinks_H, out_THE=out_THE, first_seq=decodes)
        return out_THE

    def sample(self, logits_RV: Tensor, sampling: SamplingBatch) -> Tensor:
        return sample(logits_RV, sampling)

    def draw(
        self, logits_RV: Tensor, sampling: SamplingBatch, *, first_id: int, threshold_R: Tensor | None = None
    ) -> Draw:
        return draw(logits_RV, sampling, first_id=first_id, threshold_R=threshold_R)

    def logprobs(self, logits_RV: Tensor, tokens_R: Tensor, num: int) -> Logprobs:
        log_total_R, chosen_R, rank_R = chosen_logprobs(logits_RV, tokens_R)
        top = logits_RV.float().topk(min(num, logits_RV.shape[1]), dim=-1)
        return Logprobs(chosen_R, rank_R, top.indices, top.values - log_total_R[:, None])
