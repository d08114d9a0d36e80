"""What `ModelSpec` makes of configs as they are found: old and new spellings, gaps, mistakes."""

import subprocess
import sys

import pytest
import torch

from shoal.kernels.ops import Activation
from shoal.runtime.errors import ConfigError
from shoal.runtime.models.families import FAMILIES
from shoal.runtime.models.spec import ModelSpec, QKNorm

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}


def llama(**changes):
    return ModelSpec.from_config(LLAMA | changes)


def test_importing_the_spec_does_not_import_transformers():
    code = "import sys, shoal.runtime.models.spec; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kv_heads_default_to_heads_and_head_dim_to_the_quotient():
    spec = llama()
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.num_layers) == (6, 6, 8, 2)
    assert spec.kv_shape() == (6, 8)
    assert spec.kv_shape(shard=1, shards=4) == (2, 8)
    assert spec.layers[0].attention.scale == 8**-0.5


def test_old_and_new_spellings_of_rope_are_one():
    old = llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    new = llama(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0})
    assert old == new
    assert old.layers[0].rope.inv_freq[0] == 0.25


def test_theta_beside_or_inside():
    assert llama(rope_theta=77.0) == llama(rope_parameters={"rope_type": "default", "rope_theta": 77.0})


def test_dynamic_rope_is_plain_up_to_the_original_length_and_fixed_for_a_longer_one():
    config = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    plain = llama().layers[0].rope
    assert torch.allclose(
        torch.tensor(ModelSpec.from_config(config, max_len=32).layers[0].rope.inv_freq), torch.tensor(plain.inv_freq)
    )
    longer = ModelSpec.from_config(config, max_len=128).layers[0].rope
    assert longer.inv_freq[0] == 1.0
    assert longer.inv_freq[-1] < plain.inv_freq[-1]


def test_layers_of_one_kind_share_one_rope():
    spec = llama(num_hidden_layers=5)
    assert len({id(layer.rope) for layer in spec.layers}) == 1


def test_gemma3_has_a_window_and_a_theta_for_each_kind_of_layer():
    spec = ModelSpec.from_config(
        {"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 512, "rope_local_base_freq": 10000.0}
    )
    assert [layer.attention.window for layer in spec.layers] == [512] * 5 + [None] + [512] * 2
    local, full = spec.layers[0].rope, spec.layers[5].rope
    assert local.inv_freq[1] > full.inv_freq[1]
    assert spec.qk_norm is QKNorm.HEAD
    assert spec.norm.offset == 1.0
    assert spec.layers[0].mlp.activation is Activation.GELU_TANH


def test_the_text_model_of_a_conditional_generation_config():
    text = {"model_type": "gemma3_text", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 99}
    spec = ModelSpec.from_config({"model_type": "gemma3", "text_config": text})
    assert (spec.family, spec.hidden_size, spec.vocab_size, spec.tied) == ("gemma3_text", 64, 99, True)


def test_one_and_several_ends():
    assert llama(eos_token_id=7).eos_token_ids == (7,)
    assert llama(eos_token_id=[7, 9]).eos_token_ids == (7, 9)
    assert llama(eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_old_and_new(key):
    assert llama(**{key: "bfloat16"}).dtype == "bfloat16"


def test_the_config_is_not_written_into():
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    ModelSpec.from_config(config)
    assert config == LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("model_type", ["bert", "no-such-model"])
def test_an_unknown_architecture_names_the_known_ones(model_type):
    with pytest.raises(ConfigError) as caught:
        ModelSpec.from_config({"model_type": model_type})
    assert model_type in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type"),
        ({"num_attention_heads": 0}, "num_attention_heads|zero"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"hidden_act": "snake"}, "snake"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": -3}, "vocab_size"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope"),
        ({"head_dim": 9}, "even rotary dimension"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ],
)
def test_a_wrong_config_is_refused_with_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        llama(**changes)
