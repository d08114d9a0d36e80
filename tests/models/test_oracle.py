"""Every family against transformers: fp32 logits to 1e-5 through a shuffled paged cache, and the same greedy tokens."""

from typing import Any

import pytest
import torch

from shoal.runtime.models.decoder import Step

from .support import PagedRun

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 64, "num_key_value_heads": 6}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, odd vocabulary": ("llama", {"tie_word_embeddings": True, "vocab_size": 127}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim 20": ("llama", {"head_dim": 20}),
    "llama head_dim 80, one kv head": ("llama", {"head_dim": 80, "num_key_value_heads": 1}),
    "llama head_dim 96, no grouping": ("llama", {"head_dim": 96, "num_key_value_heads": 6}),
    "llama kv heads unsaid": ("llama", {"num_key_value_heads": None}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "llama linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn, own attention factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
    "llama dynamic, within": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama gelu": ("llama", {"hidden_act": "gelu"}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "mistral no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen2 layer types, tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": SLIDING, "tie_word_embeddings": True},
    ),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 bias, windows": (
        "qwen3",
        {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "layer_types": SLIDING},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 7}),
    "gemma3 linear global rope, scalar, cap": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": 4,
            "layer_types": SLIDING,
            "query_pre_attn_scalar": 50,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2 inner size, scaling flags": ("gpt2", GPT2 | {"n_inner": 56, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2 unscaled": ("gpt2", GPT2 | {"scale_attn_weights": False, "activation_function": "relu"}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 4, "layer_types": SLIDING}),
    "phi": ("phi", {}),
    "phi qk norm, grouped": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.25}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3, "logits_scaling": 5.0},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 5, "num_hidden_layers": 5}),
    "glm": ("glm", {"head_dim": 16}),
    "glm4": ("glm4", {"head_dim": 16}),
    "cohere": ("cohere", {}),
    "cohere qk norm": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"sliding_window": 5, "num_hidden_layers": 5}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "starcoder2 no bias": ("starcoder2", {"use_bias": False}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None}),
    "gpt_neox sequential": (
        "gpt_neox",
        {"num_key_value_heads": None, "use_parallel_residual": False, "rotary_pct": 0.5},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(case, tiny, agree):
    model_type, changes = CASES[case]
    made = tiny(model_type, **changes)
    agree(made, made.decoder())


def test_dynamic_rope_beyond_the_original_length(tiny):
    """transformers takes the frequencies of the longest sequence seen; ours are those of the longest allowed."""
    made = tiny("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    same_as_one_prompt(made, length=80, max_len=80)


@pytest.mark.parametrize(("length", "max_len"), [(30, 32), (40, 64)], ids=["short factors", "long factors"])
def test_longrope(tiny, length, max_len):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3]}
    rope |= {"long_factor": [2.0, 3.0, 4.0, 5.0]}
    made = tiny("phi3", original_max_position_embeddings=32, rope_parameters=rope)
    same_as_one_prompt(made, length=length, max_len=max_len)


def test_stages_in_a_row_are_the_whole_model(tiny, agree):
    made = tiny("gemma3_text", head_dim=16, num_hidden_layers=7, sliding_window=6)
    stages = [made.decoder(layers=part) for part in (range(3), range(3, 5), range(5, 7))]
    agree(made, Row(stages))


class Row:
    """Pipeline stages as one decoder."""

    def __init__(self, stages):
        self.spec, self.stages = stages[0].spec, stages
        self.layers = range(stages[-1].layers.stop)

    def forward(self, token_ids, positions, slots, attention, kv):
        x = self.stages[0].embed(token_ids, positions)
        for stage in self.stages:
            x = stage.run(x, Step(positions, slots, attention), [kv[i] for i in stage.layers])
        return x

    def logits(self, hidden):
        return self.stages[-1].logits(hidden)


def same_as_one_prompt(made, *, length, max_len):
    prompt = [i * 7 % 101 for i in range(length)]
    (sequence,) = PagedRun(made.decoder(max_len=max_len)).run([prompt], produce=1)
    expected = made.expected(prompt)
    assert (torch.cat(sequence.logits) - expected).abs().max() <= 1e-5 * expected.abs().max()
