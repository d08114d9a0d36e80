"""Quantised checkpoints of every format: a model's logits are those of the numbers that the format stands for.

The writers were held against the real ones (compressed-tensors 0.20, AutoGPTQ 0.7, AutoAWQ 0.2, bitsandbytes 0.50).
"""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.kernels.native import load_native
from shoal.parallel.gpu import GpuKernels
from shoal.parallel.grid import Grid
from shoal.parallel.threads import thread_comms
from shoal.runtime.errors import CheckpointError
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.quantised import unquantised
from shoal.runtime.safetensors_checkpoint import SINGLE, SafetensorsCheckpoint
from shoal.runtime.share import deal
from shoal.runtime.weight_plan import StoredIn, plan_weights

from .quantised_writers import FORMATS, Format, awq, fp8_blocks, gptq, int_quantized, nf4, pack_quantized, write
from .support import PagedRun, prompts_of
from .test_tensor_parallel import whole_rows

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
Q = "model.layers.0.self_attn.q_proj"
HELD_DENSE = [name for name in FORMATS if any(word in name for word in ("fp8", "nf4", "float-"))]
ENDS = 96 * 128 * (2 + 2) + 3 * 128 * 4  # embedding, head and norms


@pytest.fixture
def quantised(tiny):
    """A tiny model whose checkpoint is rewritten in a format; its reference computes with the same numbers."""

    def make(format, *, only=lambda name: "_proj" in name, family="llama", **changes):
        made = tiny(family, **(SIZES | changes))
        numbers = write(made.folder, format, only=only)
        made.model.load_state_dict(numbers, strict=False)
        return made

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_logits_in_float32(quantised, agree, name):
    made = quantised(FORMATS[name])
    agree(made, made.decoder())


def is_4_bits(name):
    return "awq" in name or any(f"{bits} bits" in name for bits in (2, 3, 4))


def logits(decoder, prompt):
    (sequence,) = PagedRun(decoder).run([prompt], produce=1)
    return torch.cat(sequence.logits)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_from_codes_in_bfloat16(quantised, name, caplog):
    made = quantised(FORMATS[name])
    prompt = list(range(20, 52))
    with caplog.at_level(logging.WARNING):
        decoder = made.decoder(dtype=torch.bfloat16)
    expected = made.expected(prompt)
    assert (logits(decoder, prompt) - expected).norm() <= 0.02 * expected.norm()
    warnings = [record for record in caplog.records if "no kernel" in record.message]
    if load_native() is not None:
        assert len(warnings) == (name in HELD_DENSE)
    num_weights = sum(p.numel() for n, p in made.model.named_parameters() if "_proj" in n)
    held = decoder.weight_bytes - ENDS
    assert held == 2 * num_weights if warnings else held < (0.9 if is_4_bits(name) else 1.2) * num_weights


@pytest.mark.parametrize(
    ("name", "dtype", "most"),
    [
        ("awq, groups of 128", torch.bfloat16, 5 / 8),
        ("int-quantized", torch.bfloat16, 8.2 / 8),
        ("nf4, nested", torch.bfloat16, 2),
        ("awq, groups of 128", torch.float32, 4),
    ],
)
def test_memory_is_planned_for_what_stays_packed(quantised, name, dtype, most):
    if dtype is torch.bfloat16 and load_native() is None:
        pytest.skip("needs a compiler")
    made = quantised(FORMATS[name])
    checkpoint = unquantised(SafetensorsCheckpoint(made.folder))
    spec = ModelSpec.from_config(checkpoint.config)
    (share,) = deal(spec, Grid())
    planned = plan_weights(share, StoredIn(checkpoint, spec.names), device="cpu", dtype=dtype)
    norms, layer = 2 * 128 * 4, 4 * 128 * 128 - 2 * 64 * 128 + 3 * 256 * 128
    assert planned.layers == tuple(pytest.approx(layer * most + norms, rel=0.03) for _ in spec.layers)
    assert planned.total == pytest.approx(made.decoder(dtype=dtype).weight_bytes, rel=0.03)


CUT = [
    "pack-quantized 4 bits, groups of 64, act-order",
    "pack-quantized 4 bits, groups of 32, zeros",
    "pack-quantized 8 bits, rows, zeros",
    "awq, groups of 32",
    "awq, groups of 128",
    "gptq 4 bits, groups of 64, act-order",
    "gptq 3 bits, groups of 64",
    "fp8, blocks of 128",
    "float-quantized, rows",
    "nf4, nested",
    "bitsandbytes int8",
]


def run_sharded(made, size, *, dtype=torch.float32):
    """A few tokens on every shard; what the first one has."""
    comms = thread_comms(size)
    decoders = [made.decoder(comm=comm, dtype=dtype) for comm in comms]

    def run(shard):
        decoder = decoders[shard]
        kv_shape = decoder.spec.kv_shape(shard=shard, shards=size)
        whole = partial(whole_rows, vocab_size=decoder.spec.vocab_size, comm=comms[shard])
        return PagedRun(decoder, kv_shape=kv_shape, whole=whole).run(prompts_of(decoder.spec.vocab_size), produce=2)

    with ThreadPoolExecutor(size) as pool:
        return next(iter(pool.map(run, range(size))))


@pytest.mark.parametrize("name", CUT)
def test_shards(quantised, name):
    """Heads of 32 columns end within groups; the MLP's 320 columns within blocks."""
    made = quantised(FORMATS[name], intermediate_size=384)
    for sequence in run_sharded(made, 2):
        expected = made.expected(sequence.tokens[:-1])
        assert (torch.cat(sequence.logits) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["gptq 4 bits, groups of 64, act-order", "awq, groups of 128", "int-quantized"])
def test_shards_from_codes(quantised, name, caplog):
    made = quantised(FORMATS[name], intermediate_size=384)
    with caplog.at_level(logging.WARNING):
        sequences = run_sharded(made, 2, dtype=torch.bfloat16)
    assert not caplog.records
    for sequence in sequences:
        expected = made.expected(sequence.tokens[:-1])
        assert (torch.cat(sequence.logits) - expected).norm() <= 0.02 * expected.norm()


def on_gpu(*_, **__):
    """A GPU's kernels, in the interpreter."""
    return GpuKernels(torch.device("cpu"), capability=(9, 0), deterministic=False)


@pytest.mark.parametrize(
    "name",
    [
        "pack-quantized 4 bits, groups of 32, zeros",
        "gptq 4 bits, groups of 64, act-order",
        "int-quantized",
        "float-quantized, matrices",
        "fp8, blocks of 128",
    ],
)
def test_logits_from_codes_on_a_gpu(quantised, name, monkeypatch, caplog):
    monkeypatch.setattr("shoal.runtime.weights.select_kernels", on_gpu)
    made = quantised(FORMATS[name], head_dim=128 if "fp8" in name else 32)
    with caplog.at_level(logging.WARNING):
        decoder = made.decoder(dtype=torch.float16)
    assert not caplog.records
    expected = made.expected([7, 30, 52])
    assert (logits(decoder, [7, 30, 52]) - expected).norm() <= 0.02 * expected.norm()


# Which modules are quantised


def everything(name):
    return "norm" not in name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "format", [pack_quantized(8, 32), pack_quantized(4, 32), awq(64), int_quantized(), nf4(64, nested=False)]
)
def test_ends_that_are_quantised(quantised, agree, format, *, tied):
    made = quantised(format, only=everything, tie_word_embeddings=tied)
    agree(made, made.decoder())
    prompt = list(range(20, 40))
    expected = made.expected(prompt)
    assert (logits(made.decoder(dtype=torch.bfloat16), prompt) - expected).norm() <= 0.02 * expected.norm()


def test_fused_modules(quantised, agree):
    made = quantised(gptq(4, 32, symmetric=False), family="phi3")
    agree(made, made.decoder())


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "up_proj"])
def test_modules_that_are_left_out(quantised, agree, part):
    """Parts of a fused layer that are stored differently keep what they have."""
    made = quantised(gptq(4, 32), only=lambda name: "_proj" in name and part not in name)
    agree(made, made.decoder())
    prompt = list(range(20, 40))
    expected = made.expected(prompt)
    assert (logits(made.decoder(dtype=torch.bfloat16), prompt) - expected).norm() <= 0.02 * expected.norm()


def test_parts_in_orders_of_their_own(quantised, caplog):
    """Of q, k and v each in its own order of columns none is dequantised."""
    orders = iter(range(100))

    def write_one(weight):
        tensors, numbers = gptq(4, 32).write(weight)
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(next(orders)))
        words = tensors["qweight"].T.contiguous().view(torch.uint8)
        nibbles = torch.stack((words & 15, words >> 4), 2).flatten(1)[:, order]
        pairs = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        tensors["qweight"] = pairs.contiguous().view(torch.int32).T
        return tensors | {"g_idx": tensors["g_idx"][order]}, numbers[:, order]

    made = quantised(Format(gptq(4, 32, order=True).config, write_one))
    with caplog.at_level(logging.WARNING):
        decoder = made.decoder(dtype=torch.bfloat16)
    assert not caplog.records
    prompt = list(range(20, 40))
    expected = made.expected(prompt)
    assert (logits(decoder, prompt) - expected).norm() <= 0.02 * expected.norm()


def test_a_bias_beside_codes(quantised, agree):
    made = quantised(awq(32), attention_bias=True, mlp_bias=True)
    agree(made, made.decoder())


# Broken checkpoints: the error names file, tensor, expected and found


def refused(made):
    with pytest.raises(CheckpointError) as caught:
        made.decoder()
    return str(caught.value)


def without(suffix):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != f"{Q}.{suffix}"}


def shorter(suffix, dim=0):
    def change(tensors):
        tensor = tensors[f"{Q}.{suffix}"]
        return tensors | {f"{Q}.{suffix}": tensor.narrow(dim, 0, tensor.shape[dim] - 1)}

    return change


def replaced(suffix, value):
    return lambda tensors: tensors | {f"{Q}.{suffix}": value}


PACK, GPTQ = pack_quantized(4, 32, symmetric=False), gptq(4, 32, order=True)
BLOCKS, NF4 = fp8_blocks((128, 128)), nf4(64, nested=True)


@pytest.mark.parametrize(
    ("format", "change", "said"),
    [
        (PACK, without("weight_scale"), "weight_scale"),
        (PACK, without("weight_shape"), "weight_shape"),
        (PACK, shorter("weight_scale"), "[127, 4]"),
        (PACK, shorter("weight_packed", 1), "[128, 15]"),
        (PACK, shorter("weight_zero_point"), "[15, 4]"),
        (PACK, replaced("weight_shape", torch.tensor([7, 128])), "expected shape [7, 16]"),
        (PACK, replaced("weight_packed", torch.zeros(128, 16, dtype=torch.uint8)), "expected int32, found uint8"),
        (GPTQ, without("qzeros"), "qzeros"),
        (GPTQ, without("qweight"), "expected it, or its codes"),
        (GPTQ, shorter("scales"), "[3, 128]"),
        (GPTQ, shorter("g_idx"), "[127]"),
        (GPTQ, replaced("g_idx", torch.full((128,), 4)), "groups from 0 to 3"),
        (awq(32), shorter("qzeros", 1), "[4, 15]"),
        (awq(32), shorter("qweight"), "[128, 127]"),
        (int_quantized(), shorter("weight_scale"), "[127, 1]"),
        (BLOCKS, without("weight_scale_inv"), "weight_scale"),
        (BLOCKS, replaced("weight_scale_inv", torch.zeros(3, 3)), "[3, 3]"),
        (NF4, shorter("weight"), "8191"),
        (NF4, shorter("weight.absmax"), "[255]"),
        (NF4, without("weight.quant_map"), "quant_map"),
        (NF4, replaced("weight.quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8)), "quant_state"),
    ],
)
def test_damage_is_named(quantised, format, change, said):
    made = quantised(format)
    file = made.folder / SINGLE
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    message = refused(made)
    assert str(file) in message
    assert Q in message
    assert said in message


def with_group(**changes):
    """The config of compressed-tensors with other weights."""
    config = PACK.config
    group = config["config_groups"]["group_0"]
    return config | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


@pytest.mark.parametrize(
    ("format", "config", "said"),
    [
        (PACK, {"quant_method": "aqlm"}, "expected one of awq, bitsandbytes, compressed-tensors"),
        (PACK, PACK.config | {"format": "nvfp4-pack-quantized"}, "pack-quantized"),
        (PACK, PACK.config | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (PACK, PACK.config | {"config_groups": 7}, "config_groups"),
        (PACK, with_group(num_bits="four"), "num_bits"),
        (PACK, with_group(num_bits=8), "expected shape [128, 32]"),
        (PACK, with_group(group_size=64), "[128, 4]"),
        (GPTQ, GPTQ.config | {"bits": 5}, "found 5"),
        (GPTQ, GPTQ.config | {"bits": 8}, "expected shape [2, 128]"),
        (GPTQ, GPTQ.config | {"bits": None}, "bits"),
        (GPTQ, GPTQ.config | {"group_size": 64}, "expected shape [2, 128]"),
        (GPTQ, GPTQ.config | {"checkpoint_format": "marlin"}, "'gptq' or 'gptq_v2'"),
        (awq(32), awq(32).config | {"version": "gemv"}, "gemv"),
        (awq(32), awq(32).config | {"bits": 8}, "expected 4"),
        (BLOCKS, BLOCKS.config | {"weight_block_size": [128]}, "[128]"),
        (BLOCKS, BLOCKS.config | {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_configs_that_are_not_the_tensors(quantised, format, config, said):
    made = quantised(format, only=lambda name: "q_proj" in name)  # one matrix: whichever is read first is refused
    path = made.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    assert said in refused(made)
