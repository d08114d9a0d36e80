"""`shoal plan`: its memory is the engine's, its times near published ones, its choice the best, its refusals clear."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.config import load_config
from shoal.cluster.demo import demo_model
from shoal.cluster.plan_grids import Layout, plan_grid
from shoal.cluster.plan_load import missed
from shoal.cluster.plan_report import as_json, report
from shoal.parallel.threads import thread_comms
from shoal.runtime.errors import ConfigError, MemoryPlanError, ShoalError, StartupError
from shoal.runtime.memory import GIB
from shoal.runtime.rank import RankSpec, build_worker

from ..helm.chart import manifests, needs_helm
from .plans import LLAMA_8B, LLAMA_70B, QWEN3_8B, folder, plan, problem


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    at = tmp_path_factory.mktemp("models")
    sizes = {"8b": LLAMA_8B, "70b": LLAMA_70B, "qwen": QWEN3_8B}
    return {name: folder(at / name, size) for name, size in sizes.items()}


def tiny(at: Path, family: str, **sizes: Any) -> str:
    """A random checkpoint with its weights."""
    base = {
        "vocab_size": 101,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(base | sizes))).save_pretrained(at)
    return str(at)


# Memory


def built(model: str, tp: int, pp: int, **engine: Any) -> list[dict[str, int | str]]:
    """What the ranks of an engine hold once they are there."""
    asked = problem(model, "cpu", count=tp * pp, prompt="8", answer="8", **engine)
    layout = Layout(tp, (asked.pools[0].gpu,) * pp, 1)
    planned = plan_grid(asked.model, asked.config, layout, lambda gpu: 1.0)
    config = asked.config.model_copy(update={"tensor_parallel_size": tp, "pipeline_parallel_size": pp})
    rank_spec = RankSpec.of(config, model_path=Path(model), spec=asked.model.spec, depth=1)
    found = []
    for rank in planned.ranks:
        place = rank.share.place
        real = build_worker(
            rank_spec, rank_spec.share(place), comm=thread_comms(tp)[place.shard], ring=None, ranks_on_node=tp * pp
        )
        found.append(real.details())
        plan = rank.memory
        assert (
            real.details()
            | {
                "weight_bytes": plan.weight_bytes,
                "workspace_bytes": plan.workspace_bytes,
                "kv_bytes": plan.kv_bytes,
                "num_blocks": plan.num_blocks,
            }
            == real.details()
        ), place
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        ("gemma2", {"head_dim": 16, "sliding_window": 32}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_ranks_hold_what_was_planned(tmp_path: Path, family: str, sizes: dict[str, Any], dtype: str) -> None:
    model = tiny(tmp_path, family, **sizes)
    for tp, pp in ((1, 1), (2, 2), (3, 1)):
        assert len(built(model, tp, pp, dtype=dtype, max_num_seqs=64)) == tp * pp
    built(model, 2, 1, dtype=dtype, kv_cache_memory_gb=0.001, kv_cache_dtype="int8")


def test_a_gguf_file_takes_what_was_planned() -> None:
    file = demo_model()
    if file is None:
        pytest.skip("the demo model is not installed")
    asked = problem(str(file), "cpu", count=1, context="1k", prompt="512", answer="64")
    layout = Layout(1, (asked.pools[0].gpu,), 1)
    (rank,) = plan_grid(asked.model, asked.config, layout, lambda gpu: 1.0).ranks
    rank_spec = RankSpec.of(asked.config, model_path=file, spec=asked.model.spec, depth=1)
    real = build_worker(rank_spec, rank.share, comm=thread_comms(1)[0], ring=None)
    assert rank.memory.weight_bytes == pytest.approx(real.weight_bytes, rel=0.01)
    assert rank.memory.num_blocks == real.memory.num_blocks


def test_every_byte_of_a_gpu_is_accounted_for(models: dict[str, str]) -> None:
    for option in plan(models["70b"], "H100", count=8, context="8k").options:
        for rank in option.grid.ranks:
            memory = rank.memory
            used = memory.weight_bytes + memory.workspace_bytes + memory.kv_bytes
            assert used + rank.reserved <= rank.budget == int(option.layout.stages[0].memory * 0.9)
        assert option.grid.kv_tokens == min(rank.memory.kv_tokens for rank in option.grid.ranks)
    one = plan(models["8b"], "H100", count=1).pick.grid.ranks[0]
    parameters = 8_030_261_248  # of Llama 3 8B
    assert one.memory.weight_bytes == pytest.approx(2 * parameters, rel=1e-4)
    eager = plan(models["8b"], "H100", count=1, enforce_eager=True).pick.grid.ranks[0]
    assert eager.memory.graph_bytes == 0 < one.memory.graph_bytes


def test_quantised_weights_leave_room_and_take_scratch(models: dict[str, str]) -> None:
    dense, int4 = (plan(models["8b"], "H100", quantization=name).pick for name in (None, "int4"))
    layers = 2 * 6_979_321_856  # in bfloat16: all but the vocabulary
    saved = dense.grid.ranks[0].memory.weight_bytes - int4.grid.ranks[0].memory.weight_bytes
    assert saved == pytest.approx(layers * (1 - 4.25 / 16), rel=0.01)
    extra = int4.grid.ranks[0].memory.workspace_bytes - dense.grid.ranks[0].memory.workspace_bytes
    assert extra >= 64 << 20  # the slab that a product of many rows unpacks into
    assert int4.grid.kv_tokens > dense.grid.kv_tokens


def test_an_8_bit_cache_holds_nearly_twice_as_much(models: dict[str, str]) -> None:
    wide, narrow = (plan(models["8b"], "L40S", kv_cache_dtype=name).pick for name in ("auto", "int8"))
    assert narrow.grid.kv_tokens == pytest.approx(wide.grid.kv_tokens * 2 * 128 / (128 + 4), rel=0.01)


# Time


def test_a_published_run_comes_out_near_what_was_measured(models: dict[str, str]) -> None:
    """Qwen3-8B on one H200, 256 requests of 1,024 tokens that get 1,024 each: 30.9, 34.7 and 36.9 s were published for
    three engines; reading and computing at the device's measured rates alone takes 23.5 s."""
    costs = plan(models["qwen"], "H200", context="4k", prompt="1k", answer="1k").pick.costs
    prompts = 256 * 1024 / 2048 * costs.step_s(2048, 0, 512)
    answers = sum(costs.step_s(0, 256, 256 * (1024 + token)) for token in range(1024))
    assert 27 < prompts + answers < 37


def test_times_follow_the_grid(models: dict[str, str]) -> None:
    options = {(o.layout.tp, o.layout.grid.pp): o for o in plan(models["70b"], "H100", count=8, context="8k").options}
    alone = {grid: option.forecast.alone_itl_s for grid, option in options.items()}
    assert alone[8, 1] < alone[4, 1] < alone[2, 1]  # weights are read by more GPUs at once
    latency = options[8, 1].costs.stages[0].fixed_s - options[4, 1].costs.stages[0].fixed_s
    assert latency == pytest.approx((2 * 80 + 1) * 2 * (7 - 3) * 2e-6)  # and all-reduces are dearer
    assert alone[1, 8] == pytest.approx(alone[1, 4], rel=0.1)  # stages follow each other
    weights = 2 * 70.55e9 / 8
    assert alone[8, 1] > weights / 3.35e12


def test_a_quantised_model_decodes_faster_and_reads_prompts_as_fast(models: dict[str, str]) -> None:
    dense, int4, w8a8 = (plan(models["8b"], "H100", quantization=name).pick for name in ("none", "int4", "w8a8"))
    assert int4.forecast.alone_itl_s < 0.5 * dense.forecast.alone_itl_s
    assert int4.forecast.alone_ttft_s == pytest.approx(dense.forecast.alone_ttft_s, rel=0.1)
    assert w8a8.forecast.alone_ttft_s < 0.7 * dense.forecast.alone_ttft_s


# The choice


def test_without_a_rate_the_most_tokens_win(models: dict[str, str]) -> None:
    made = plan(models["8b"], "H200", count=4)
    goodputs = [option.forecast.goodput for option in made.options]
    assert goodputs == sorted(goodputs, reverse=True)
    assert made.pick.layout.num_gpus == 4


def test_under_a_rate_the_cheapest_that_keeps_up_wins(models: dict[str, str]) -> None:
    small, large = (
        plan(models["8b"], "H100", count=4, rate=rate, answer="100", ttft="1s", itl="50ms").pick
        for rate in ("2/s", "60/s")
    )
    assert small.forecast.meets
    assert small.layout.num_gpus == 1
    assert large.forecast.meets
    assert large.layout.num_gpus > 1
    assert small.forecast.goodput == pytest.approx(2 * 100)
    assert small.forecast.ttft_s <= 1.0
    assert large.usd_a_million < small.usd_a_million


def test_the_objectives_bound_how_many_run_at_once(models: dict[str, str]) -> None:
    free, held = (plan(models["8b"], "H100", itl=itl).pick.forecast.capacity for itl in (None, "12ms"))
    assert held.rows < free.rows
    assert held.binds == "--itl"
    assert held.itl_s <= 0.012


def test_what_no_grid_keeps_is_said(models: dict[str, str]) -> None:
    made = plan(models["70b"], "A100", count=4, context="8k", rate="500/s", ttft="200ms")
    assert not any(option.forecast.meets for option in made.options)
    assert made.pick.forecast.ttft_s == float("inf")


@pytest.mark.parametrize(
    ("asked", "flags"),
    [
        ({"ttft": "1ms"}, ["--ttft"]),
        ({"ttft": "1ms", "itl": "10us"}, ["--itl", "--ttft"]),
        ({"rate": "500/s"}, ["--rate"]),
        ({"rate": "2/s", "ttft": "1ms"}, ["--ttft"]),
    ],
)
def test_what_no_grid_keeps_is_said_with_by_how_much(
    models: dict[str, str], asked: dict[str, str], flags: list[str]
) -> None:
    """And what is picked misses it by least."""
    made = plan(models["8b"], "L4", count=2, context="4k", **asked)
    demand = made.problem.demand
    found = [missed(option.forecast, demand, replicas=option.layout.replicas) for option in made.options]
    assert [miss.flag for miss in found[0]] == flags
    assert found[0][0].times == min(misses[0].times for misses in found) > 1
    assert all(f"{flag} " in report(made) for flag in flags)
    assert "this one comes nearest: " in report(made)
    assert f"({found[0][0].times:.3g} times " in report(made)
    assert [miss["flag"] for miss in as_json(made)["options"][0]["missed"]] == flags


def test_mixed_gpus_get_layers_by_their_speed(models: dict[str, str]) -> None:
    made = plan(models["70b"], "H100:4,A100:4", context="8k")
    for option in made.options:
        names = [gpu.name for gpu in option.layout.stages]
        assert set(names) == {"H100", "A100-80"}
        assert option.grid.pp_layers is not None
        assert sum(option.grid.pp_layers) == 80
    wide = next(o for o in made.options if (o.layout.tp, o.layout.grid.pp) == (4, 2))
    fast, slow = wide.grid.pp_layers or (0, 0)
    assert fast > 1.5 * slow
    even = plan(models["70b"], "A100", count=8, context="8k")
    assert all(option.grid.pp_layers is None for option in even.options)


def test_a_slow_gpu_gets_more_layers_where_the_fast_one_has_no_room(models: dict[str, str]) -> None:
    made = plan(models["70b"], "H100:1,A100:2", context="8k", prompt="512", answer="64")
    (option,) = (o for o in made.options if o.layout.grid.pp == 3)
    for rank in option.grid.ranks:
        assert rank.memory.weight_bytes + rank.memory.workspace_bytes + rank.reserved < rank.budget


# Refusals, and what is written


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "H300"], ["H300", "did you mean H", "A100-80"]),
        (["--gpu", "MI300X"], ["MI300X", "not supported", "CUDA"]),
        (["--gpu", "H100", "--count", "0"], ["--count", "1 to 1024"]),
        (["--gpu", "H100:4", "--count", "4"], ["--count 4", "leave --count out"]),
        (["--gpu", "H100:4,A100"], ["H100:4,A100:4"]),
        (["--gpu", "H100", "--context", "8q"], ["--context '8q'", "128k"]),
        (["--gpu", "H100", "--context", "16k"], ["16384", "8192 positions"]),
        (["--gpu", "H100", "--rate", "fast"], ["--rate 'fast'", "5/s"]),
        (["--gpu", "H100", "--ttft", "500"], ["--ttft '500'", "500ms"]),
        (["--gpu", "H100", "--prompt", "8k"], ["--prompt 8k", "8192", "--context"]),
        (["--gpu", "H100", "--quantization", "int3"], ["int3", "int4", "w8a8"]),
        (["--gpu", "A100", "--kv-cache-dtype", "fp8"], ["fp8", "A100-80", "int8"]),
        (["--gpu", "H100", "--write", "plan.txt"], ["plan.txt", "shoal.yaml"]),
        (["--gpu", "H100", "--calibrate", "nowhere.json"], ["--calibrate nowhere.json", "No such file"]),
    ],
)
def test_refusals_name_the_value_and_the_way_out(models: dict[str, str], flags: list[str], words: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", models["8b"], *flags])
    assert isinstance(result.exception, ConfigError), result.output
    for word in words:
        assert word in str(result.exception)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        plan(str(tmp_path), "H100")


def test_what_does_not_fit_is_told_what_would(models: dict[str, str]) -> None:
    with pytest.raises(MemoryPlanError) as refusal:
        plan(models["70b"], "L4", count=2, context="8k")
    message = str(refusal.value)
    assert "--gpu-memory-utilization" in message  # as the engine would say it
    assert "times as many GPUs" in message
    assert issubclass(MemoryPlanError, StartupError), "which the command line ends with exit code 2"
    with pytest.raises(ShoalError) as refusal:
        plan(folder(Path(models["8b"]).parent / "long", LLAMA_8B, max_position_embeddings=1 << 20), "L4")
    assert "--context" in str(refusal.value)
    assert "--quantization int4" not in str(refusal.value)  # a million tokens take more than that gives


@pytest.mark.parametrize("name", ["shoal.yaml", "values.yaml"])
def test_the_pick_is_written_as_a_deployment(models: dict[str, str], tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    flags = ["--gpu", "H100:2,A100:2", "--context", "4k", "--kv-cache-dtype", "int8", "--write", str(file)]
    result = CliRunner().invoke(app, ["plan", models["70b"], *flags])
    assert result.exit_code == 0, result.exception
    assert "Pick: tp" in result.output
    tree = yaml.safe_load(file.read_text())
    if name == "values.yaml":
        per_pod = tree["engine"]["tensor_parallel_size"]  # a stage a pod, for no machine has both types
        assert tree.pop("cluster") == {"replica": {"gpusPerNode": per_pod}}
        assert tree.pop("weights") == {"source": "image"}
        assert tree["engine"]["device"] == "cuda"
        file.write_text(yaml.safe_dump(tree))
    config = load_config({}, file=file)
    assert config.engine.model == models["70b"]
    assert config.engine.kv_cache_dtype == "int8"
    assert config.engine.max_model_len == 4096
    assert config.engine.pp_layers is not None
    assert len(config.engine.pp_layers) == config.engine.pipeline_parallel_size
    assert config.engine.grid.size * config.server.replicas <= 4


@needs_helm
def test_the_chart_takes_written_values(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    flags = ["--gpu", "H100", "--count", "8", "--gpus-per-node", "4", "--context", "4k", "--write", str(file)]
    assert CliRunner().invoke(app, ["plan", models["70b"], *flags]).exit_code == 0
    values = yaml.safe_load(file.read_text())
    engine = values["engine"]
    grid = engine["tensor_parallel_size"] * engine.get("pipeline_parallel_size", 1)
    rayservice = next(each for each in manifests(values) if each["kind"] == "RayService")
    groups = rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    stable = next(group for group in groups if group["groupName"] == "stable")
    container = stable["template"]["spec"]["containers"][0]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus <= 4
    assert gpus * stable["numOfHosts"] == grid


def test_a_model_that_is_to_be_quantised_first_says_so(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    flags = ["--gpu", "L4", "--quantization", "int4", "--write", str(file)]
    output = CliRunner().invoke(app, ["plan", models["8b"], *flags]).output
    assert f"shoal quantize {models['8b']} --format int4 --out {models['8b']}-int4" in output
    assert load_config({}, file=file).engine.model == f"{models['8b']}-int4"


def test_json_says_the_same(models: dict[str, str]) -> None:
    flags = ["--gpu", "H100", "--count", "2", "--rate", "500/s", "--price", "2", "--json"]
    found = json.loads(CliRunner().invoke(app, ["plan", models["8b"], *flags]).output)
    assert found["gpus"] == {"H100": 2}
    first = found["options"][0]
    assert first["ttft_s"] is None  # a queue that grows has no time to a first token
    assert first["usd_per_hour"] == 2.0 * first["replicas"] * len(first["ranks"])
    assert first["ranks"][0]["kv_bytes"] > GIB
    assert torch.bfloat16.itemsize * 8_030_261_248 == pytest.approx(
        sum(rank["weight_bytes"] for rank in first["ranks"]), rel=0.01
    )


@pytest.mark.parametrize(
    ("told", "bits", "rounds_to"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4.25, None),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, 8.25, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8.25, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "int"},
                        "input_activations": {"num_bits": 8, "type": "int"},
                    }
                },
            },
            8.0,
            "int8",
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 16.0, None),
    ],
)
def test_the_config_says_how_weights_are_stored(
    tmp_path: Path, told: dict[str, Any], bits: float, rounds_to: str | None
) -> None:
    model = folder(tmp_path / "m", LLAMA_8B, quantization_config=told)
    made = plan(model, "H100")
    assert made.problem.model.rounds_to == rounds_to
    vocabulary = 2 * 2 * 128256 * 4096
    held = made.pick.grid.ranks[0].memory.weight_bytes - vocabulary
    assert held == pytest.approx(6_979_321_856 * bits / 8, rel=0.01)
    with pytest.raises(ConfigError, match="quantised already"):
        plan(model, "H100", quantization="int4")


def test_every_command_of_the_page_on_sizing_runs(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent.parent / "docs" / "SIZING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("shoal plan")]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("Qwen/Qwen3-8B", models["qwen"]))[1:]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (command, result.exception)
        assert "Pick: tp" in result.output
