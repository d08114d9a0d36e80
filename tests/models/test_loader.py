"""Weights as they are found: sharded, renamed, tied or not, in other dtypes, broken."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.kernels.reference import ReferenceOps
from shoal.parallel.codes import Codes, Kind
from shoal.parallel.comm import SoloComm
from shoal.parallel.quant import DenseLinear
from shoal.runtime.checkpoint import Form
from shoal.runtime.errors import CheckpointError, ConfigError
from shoal.runtime.loader import load_decoder
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.progress import Progress
from shoal.runtime.safetensors_checkpoint import INDEX, SINGLE, SafetensorsCheckpoint

from .support import PagedRun

Q = "model.layers.1.self_attn.q_proj.weight"


def rewrite(made, change):
    """Change the tensors of a saved checkpoint."""
    file = made.folder / SINGLE
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)


def renamed(prefix_from, prefix_to):
    return lambda tensors: {
        (prefix_to + name.removeprefix(prefix_from) if name.startswith(prefix_from) else name): tensor
        for name, tensor in tensors.items()
    }


def write_config(made, **changes):
    path = made.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(made, **options):
    with pytest.raises(CheckpointError) as caught:
        made.decoder(**options)
    return str(caught.value)


# Where tensors lie and what they are called


def test_shards_with_an_index(tiny, agree):
    made = tiny("llama", shard_size="20KB")
    assert len(list(made.folder.glob("*.safetensors"))) > 3
    agree(made, made.decoder())


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "language_model."])
def test_prefixes_of_other_classes(tiny, agree, prefix):
    made = tiny("llama", tie_word_embeddings=True)
    rewrite(made, renamed("model.", prefix))
    agree(made, made.decoder())


def test_gpt2_as_it_was_published_without_prefix_and_with_buffers(tiny, agree, caplog):
    made = tiny("gpt2", n_embd=48, n_head=6, n_layer=2, n_positions=64, num_key_value_heads=6, num_hidden_layers=2)
    rewrite(made, renamed("transformer.", ""))
    rewrite(made, lambda tensors: tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)})
    with caplog.at_level(logging.WARNING):
        agree(made, made.decoder())
    assert not caplog.records


def test_the_text_part_of_gemma3_for_conditional_generation(tiny, agree):
    made = tiny("gemma3_text", head_dim=16, num_hidden_layers=2, sliding_window=4)
    text = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    rewrite(made, renamed("model.", "language_model.model."))
    rewrite(made, lambda tensors: tensors | {"vision_tower.embed_tokens.weight": torch.zeros(2, 2)})
    agree(made, made.decoder())


def test_tied_with_an_equal_head_in_the_file(tiny, agree):
    made = tiny("llama", tie_word_embeddings=True)
    rewrite(made, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    agree(made, made.decoder())


def test_tied_by_the_config_but_not_by_the_file(tiny, agree):
    made = tiny("llama", tie_word_embeddings=False)
    write_config(made, tie_word_embeddings=True)
    agree(made, made.decoder())


def test_tied_with_only_the_head_in_the_file(tiny, agree):
    made = tiny("llama", tie_word_embeddings=True)
    rewrite(made, renamed("model.embed_tokens", "lm_head"))
    agree(made, made.decoder())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_checkpoints_in_float32(tiny, agree, dtype):
    made = tiny("qwen3", dtype=dtype, head_dim=16)
    assert made.checkpoint().tensor(Q).dtype == dtype
    agree(made, made.decoder())


def test_bfloat16_is_close_and_half_the_size_but_for_the_head(tiny):
    made = tiny("gemma3_text", dtype=torch.bfloat16, head_dim=16, num_hidden_layers=2)
    decoder = made.decoder(dtype=torch.bfloat16)
    prompt = list(range(20, 40))
    (sequence,) = PagedRun(decoder).run([prompt], produce=1)
    found, expected = torch.cat(sequence.logits), made.expected(prompt)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    head_bytes = 4 * 101 * 48
    assert decoder.weight_bytes < head_bytes + 2.2 * sum(parameter.numel() for parameter in made.model.parameters())


def test_a_tied_head_takes_no_memory(tiny):
    tied, untied = (tiny("llama", tie_word_embeddings=flag).decoder().weight_bytes for flag in (True, False))
    assert untied - tied == 101 * 48 * 4


# Only what is asked for


class Recording(SafetensorsCheckpoint):
    """Counts the numbers that were asked for."""

    def __init__(self, folder):
        super().__init__(folder)
        self.asked = {}

    def tensor(self, name, cut=()):
        found = super().tensor(name, cut)
        self.asked[name] = self.asked.get(name, 0) + found.numel()
        return found


class Shard(SoloComm):
    def __init__(self, shard, size):
        self.shard, self.size = shard, size


def test_a_rank_reads_only_its_own_slices(tiny):
    made = tiny("llama", num_attention_heads=6, num_key_value_heads=3, intermediate_size=96)
    checkpoint = Recording(made.folder)
    spec = ModelSpec.from_config(checkpoint.config)
    ops = ReferenceOps(torch.device("cpu"))
    load_decoder(checkpoint, spec, ops=ops, dtype=torch.float32, comm=Shard(1, 3), layers=range(1, 2))
    assert {name.split(".")[2] for name in checkpoint.asked if "layers" in name} == {"1"}
    assert checkpoint.asked[Q] == 48 * 48 // 3
    assert checkpoint.asked["model.layers.1.mlp.down_proj.weight"] == 48 * 96 // 3
    assert not any("embed" in name or "lm_head" in name for name in checkpoint.asked)


def test_stages_make_the_whole(tiny):
    made = tiny("llama")
    whole, stages = made.decoder(), [made.decoder(layers=range(2)), made.decoder(layers=range(2, 3))]
    assert sum(stage.weight_bytes for stage in stages) == whole.weight_bytes


class Coded(SafetensorsCheckpoint):
    """Matrices as codes that are the very numbers, but for one that has none."""

    def form(self, name):
        return Form("TEST", 1, Kind.INT8) if len(self.shape(name)) == 2 else None

    def codes(self, name, cut=()):
        if "down_proj" in name:
            return None
        part = self.tensor(name, cut)
        return Codes(part, torch.ones(len(part), 1), None, part.shape[1], part.shape[1])


class Recorded:
    """Kernels that take everything."""

    kinds = frozenset(Kind)

    def __init__(self):
        self.made = []

    def make(self, weight):
        self.made.append((weight.out_features, weight.in_features))
        return DenseLinear(weight.dense())

    def dense(self, weight_FD):
        return None

    def head(self, weight):
        return None


def test_codes_are_kept_where_there_is_a_kernel_for_them(tiny, agree, monkeypatch, caplog):
    kernels = Recorded()
    monkeypatch.setattr("shoal.runtime.weights.select_kernels", lambda *_, **__: kernels)
    made = tiny("llama", tie_word_embeddings=True, num_hidden_layers=2)
    monkeypatch.setattr(made, "checkpoint", lambda: Coded(made.folder), raising=False)
    with caplog.at_level(logging.WARNING):
        agree(made, made.decoder())
    q_k_v, gate_up, out = (80, 48), (144, 48), (48, 48)
    assert sorted(kernels.made) == sorted([q_k_v, gate_up, out] * 2)
    assert caplog.text.count("TEST") == 1  # of down_proj, in the first layer that has it


def test_without_a_kernel_codes_are_read_as_numbers(tiny, agree, monkeypatch):
    made = tiny("llama", tie_word_embeddings=True)
    monkeypatch.setattr(made, "checkpoint", lambda: Coded(made.folder), raising=False)
    agree(made, made.decoder())


# Broken checkpoints: the error names file, tensor, expected and found


def test_a_missing_tensor(tiny):
    made = tiny("llama")
    rewrite(made, lambda tensors: {name: t for name, t in tensors.items() if name != Q})
    message = refused(made)
    assert SINGLE in message
    assert Q in message


def test_a_missing_head(tiny):
    made = tiny("llama")
    rewrite(made, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})
    assert "lm_head.weight" in refused(made)


@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_misshaped_tensor(tiny, name):
    made = tiny("llama")
    right = list(made.checkpoint().shape(name))
    rewrite(made, lambda tensors: tensors | {name: torch.zeros(47, *right[1:])})
    message = refused(made)
    assert str(made.folder / SINGLE) in message
    assert name in message
    assert f"expected shape {right}" in message
    assert f"found {[47, *right[1:]]}" in message


def test_a_truncated_file(tiny):
    made = tiny("llama")
    file = made.folder / SINGLE
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 10)
    message = refused(made)
    assert str(file) in message
    assert "tensor '" in message
    assert f"byte {size}" in message
    assert f"{size - 10} bytes" in message


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, (9).to_bytes(8, "little") + b"{not json"])
def test_a_file_that_is_not_safetensors(tiny, content):
    made = tiny("llama")
    (made.folder / SINGLE).write_bytes(content)
    assert SINGLE in refused(made)


@pytest.mark.parametrize(
    "field",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        7,
    ],
)
def test_a_header_that_lies(tmp_path, field):
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"w": field}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=SINGLE):
        SafetensorsCheckpoint(tmp_path)


def test_a_missing_shard(tiny):
    made = tiny("llama", shard_size="20KB")
    shard = sorted(made.folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused(made)


def test_a_tensor_missing_from_its_shard(tiny):
    made = tiny("llama", shard_size="20KB")
    index = json.loads((made.folder / INDEX).read_text())
    first, other = index["weight_map"][Q], index["weight_map"]["model.norm.weight"]
    assert first != other
    index["weight_map"][Q] = other
    (made.folder / INDEX).write_text(json.dumps(index))
    message = refused(made)
    assert other in message
    assert Q in message


@pytest.mark.parametrize("path", ["../model.safetensors", "/etc/passwd", "a/../../b", "", 7, None, "a\0b", "..\\b"])
def test_an_index_may_not_lead_out_of_the_folder(tiny, path):
    made = tiny("llama", shard_size="20KB")
    index = json.loads((made.folder / INDEX).read_text())
    index["weight_map"][Q] = path
    (made.folder / INDEX).write_text(json.dumps(index))
    assert "inside the folder" in refused(made)


def test_a_folder_without_safetensors_says_what_it_has(tiny):
    made = tiny("llama")
    (made.folder / SINGLE).rename(made.folder / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused(made)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        SafetensorsCheckpoint(tmp_path)


def test_a_checkpoint_of_another_family(tiny):
    llama, gpt2 = tiny("llama"), tiny("gpt2", n_embd=48, n_head=6, n_layer=2)
    shutil.copy(gpt2.folder / SINGLE, llama.folder / SINGLE)
    assert "embed_tokens.weight" in refused(llama)


def test_biases_that_the_config_does_not_know_are_reported(tiny, caplog):
    made = tiny("llama")
    rewrite(made, lambda tensors: tensors | {Q.replace("weight", "bias"): torch.ones(48)})
    with caplog.at_level(logging.WARNING):
        made.decoder()
    assert "1 tensors" in caplog.text
    assert "q_proj.bias" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_need_scales_are_refused(tiny, dtype):
    made = tiny("llama")
    rewrite(made, lambda tensors: tensors | {Q: tensors[Q].to(dtype)})
    assert str(dtype).removeprefix("torch.") in refused(made)


def test_more_positions_than_were_learned(tiny):
    made = tiny("gpt2", num_key_value_heads=6)
    with pytest.raises(ConfigError, match="64 positions"):
        made.decoder(max_len=65)


def test_more_ranks_than_heads(tiny):
    with pytest.raises(ConfigError, match="tensor_parallel_size 7"):
        tiny("llama").decoder(comm=Shard(0, 7))


# Progress


class Stream:
    def __init__(self, terminal):
        self.terminal, self.text = terminal, ""

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def run_progress(stream, **options):
    with Progress("Loading", total=100, unit="layers", stream=stream, clock=lambda: 0.0, **options) as progress:
        for _ in range(100):
            progress.advance()
    return stream.text


def test_a_bar_on_a_terminal():
    text = run_progress(Stream(True))
    assert text.count("\r") == 100
    assert text.endswith("100/100 layers, 0.0 s\n")


def test_a_few_plain_lines_elsewhere():
    text = run_progress(Stream(False))
    assert "\r" not in text
    assert text.splitlines()[0] == "Loading: 100 layers"
    assert text.splitlines()[-1] == "Loading: 100 %, 100/100 layers, 0.0 s"
    assert len(text.splitlines()) == 5


def test_progress_that_is_not_shown():
    assert run_progress(Stream(True), show=False) == ""
