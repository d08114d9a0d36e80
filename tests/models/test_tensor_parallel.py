"""Shards of one model, run in lockstep in one process, together give the whole model's logits."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from shoal.parallel.partition import cut_vocab, length
from shoal.parallel.threads import thread_comms

from .support import PagedRun, prompts_of

CASES = {
    "llama 9:3 heads at 2": ("llama", 2, {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama 9:3 heads at 3": ("llama", 3, {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama 9:3 heads at 5": ("llama", 5, {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama tied, biases": ("llama", 2, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama, columns that no unit divides": ("llama", 3, {"intermediate_size": 71}),
    "qwen2": ("qwen2", 2, {}),
    "qwen3": ("qwen3", 3, {"head_dim": 16}),
    "gemma3, one kv head": ("gemma3_text", 2, {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 6}),
    "gpt2: stacked, transposed": ("gpt2", 2, {"num_key_value_heads": 6}),
    "phi3: stacked": ("phi3", 2, {}),
    "gpt_neox: grouped, parallel": ("gpt_neox", 3, {"num_key_value_heads": 6}),
    "cohere: parallel, norms of heads": ("cohere", 2, {"use_qk_norm": True}),
    "olmo2: norm over all heads": ("olmo2", 2, {}),
    "olmo2: norm over copied kv heads": ("olmo2", 5, {}),
}


def whole_rows(logits, *, vocab_size, comm):
    """Of each rank's columns; a gather wants equal shapes."""
    sizes = [length(cut_vocab(vocab_size, shard=shard, size=comm.size)) for shard in range(comm.size)]
    assert logits.shape[1] == sizes[comm.shard]
    parts = comm.all_gather(F.pad(logits, (0, max(sizes) - logits.shape[1])))
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


@pytest.mark.parametrize("case", CASES)
def test_shards_agree_with_transformers(case, tiny):
    model_type, size, changes = CASES[case]
    made = tiny(model_type, **changes)
    comms = thread_comms(size)
    decoders = [made.decoder(comm=comm) for comm in comms]

    def run(shard):
        decoder = decoders[shard]
        kv_shape = decoder.spec.kv_shape(shard=shard, shards=size)
        whole = partial(whole_rows, vocab_size=decoder.spec.vocab_size, comm=comms[shard])
        return PagedRun(decoder, kv_shape=kv_shape, whole=whole).run(prompts_of(decoder.spec.vocab_size), produce=3)

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(run, range(size)))
    for sequence, *others in zip(*results, strict=True):
        expected = made.expected(sequence.tokens[:-1])
        found = torch.cat(sequence.logits)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert all(torch.equal(torch.cat(other.logits), found) for other in others)
