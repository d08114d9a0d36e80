"""The planner's parts: sizes as people write them, the table of GPUs, calibration, and the cut by speeds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.plan import make_plan
from shoal.cluster.plan_costs import RooflineCosts, StageCosts, Typical
from shoal.cluster.plan_gpus import GPUS, find_gpu, parse_pools, with_price
from shoal.cluster.plan_load import Demand, capacity, forecast, simulated
from shoal.cluster.plan_units import parse_rate, parse_seconds, parse_tokens
from shoal.parallel.partition import cut_layers
from shoal.runtime.errors import ConfigError

from .plans import LLAMA_8B, folder, problem


@pytest.mark.parametrize(
    ("text", "tokens"), [("300", 300), ("8k", 8192), ("1.5K", 1536), ("1m", 1 << 20), (" 2 k", 2048)]
)
def test_tokens(text: str, tokens: int) -> None:
    assert parse_tokens(text, "--context") == tokens


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("2s", 2.0), ("0.25 s", 0.25), ("800us", 0.0008), ("1min", 60.0)]
)
def test_times(text: str, seconds: float) -> None:
    assert parse_seconds(text, "--ttft") == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "rate"), [("5/s", 5.0), ("5", 5.0), ("300/min", 5.0), ("3600/h", 1.0), (".5/s", 0.5)])
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text, "--rate") == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "k", "-1", "8kb", "0", "0.3", "1e3", "nan", "8 k tokens"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--context"):
        parse_tokens(text, "--context")


def test_a_time_needs_its_unit_and_a_rate_something_to_come() -> None:
    for text in ("500", "0ms", "5/s", ""):
        with pytest.raises(ConfigError, match="--itl"):
            parse_seconds(text, "--itl")
    for text in ("0/s", "5/day", "5ms"):
        with pytest.raises(ConfigError, match="--rate"):
            parse_rate(text, "--rate")


def test_the_table_is_plausible() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(name.lower()) is gpu
        assert 20 < gpu.gib < 200
        assert 100 < gpu.tflops / (gpu.gb_s / 1e3) < 500, "operations a byte"
        assert gpu.tflops_8bit == pytest.approx(2 * gpu.tflops, rel=0.02)
        assert 0.1 < gpu.usd_h < 10
    assert find_gpu("a100") is GPUS["A100-80"]
    assert find_gpu("rtx 4090") is GPUS["RTX-4090"]
    assert [(pool.gpu.name, pool.count) for pool in parse_pools("h100:4, a100-40:2", None)] == [
        ("H100", 4),
        ("A100-40", 2),
    ]
    assert with_price(parse_pools("H100", 1), 1.5)[0].gpu.usd_h == 1.5


def costs(**changes: Any) -> RooflineCosts:
    stage = StageCosts(
        fixed_s=1e-3, read_s=4e-3, context_s=5e-8, prefill_s=3e-5, row_s=3e-5, extra_row_s=0.0, comm_s=0.0
    )
    values = {
        "base_s": 5e-3,
        "prefill_token_s": 3e-5,
        "decode_row_s": 3e-5,
        "context_token_s": 5e-8,
        "kv_tokens": 400_000,
        "stages": (stage,),
        "host_s": 1e-4,
        "host_row_s": 3e-6,
    }
    return RooflineCosts(**(values | changes))


def test_a_step_is_a_roofline() -> None:
    one = costs()
    assert one.step_s(0, 1, 0) == pytest.approx(5e-3)  # reading the weights
    assert one.step_s(0, 100, 0) == pytest.approx(5e-3)  # hides the products of a hundred sequences
    assert one.step_s(2048, 0, 0) == pytest.approx(1e-3 + 2048 * 3e-5)  # but not those of a prompt
    assert one.step_s(0, 1, 100_000) == pytest.approx(10e-3)  # attention comes on top
    slow_host = costs(host_s=1.0)
    assert slow_host.step_s(0, 1, 0) == pytest.approx(1.0, rel=0.01)


def test_stages_share_the_work_and_follow_each_other() -> None:
    half = replace(costs().stages[0], fixed_s=5e-4, read_s=2e-3, context_s=2.5e-8, prefill_s=1.5e-5, row_s=1.5e-5)
    two = costs(stages=(half, half), max_num_batched_tokens=4096)
    assert two.step_s(0, 1, 0) == pytest.approx(costs().step_s(0, 1, 0))
    assert two.step_s(4096, 0, 0) < 0.6 * costs().step_s(4096, 0, 0)
    alone = two.prompt_s(1024)
    assert alone == pytest.approx(costs().prompt_s(1024))  # one prompt of one chunk is in one stage at a time
    chunks = two.prompt_s(8192)  # four chunks through two stages take five turns of one
    assert chunks == pytest.approx(5 * half.step_s(2048, 0, 0))


def test_capacity_is_what_memory_or_the_objective_allows() -> None:
    demand = Demand(Typical(1000, 200), 8192)
    free = capacity(costs(), demand)
    assert (free.rows, free.binds) == (256, "--max-num-seqs")
    small = capacity(costs(kv_tokens=12_000), demand)
    assert (small.rows, small.binds) == (10, "KV cache")
    held = capacity(costs(), replace(demand, itl_s=15e-3))
    assert 0 < held.rows < 256
    assert held.binds == "--itl"
    more = costs().step_s((held.rows + 1) * 5, held.rows + 1, (held.rows + 1) * 1100)
    assert held.itl_s <= 15e-3 < more
    assert held.tokens_s == pytest.approx(held.rows / held.itl_s)
    none = capacity(costs(), replace(demand, ttft_s=1e-3))
    assert (none.rows, none.binds, none.tokens_s) == (0, "--ttft", 0.0)


def test_a_queue_grows_with_the_rate() -> None:
    demand = Demand(Typical(1000, 50), 8192)
    quiet, busy = (simulated(costs(), demand, rate) for rate in (1.0, 20.0))
    assert quiet is not None
    assert busy is not None
    assert quiet.answered == busy.answered == 300
    assert 0.8 * costs().prompt_s(1000) <= quiet.ttft_s.p50 < busy.ttft_s.p50 < busy.ttft_s.p99
    drowned = forecast(costs(), replace(demand, rate=1000.0), replicas=2)
    assert drowned.ttft_s == float("inf")
    assert not drowned.meets


# Calibration


def test_measured_kernels_replace_the_data_sheet(tmp_path: Path) -> None:
    figures = [
        {"name": "products of a layer, dense, 1 tokens", "copy_share": 0.9, "peak_share": 0.01},
        {"name": "products of a layer, dense, 512 tokens", "copy_share": 0.2, "peak_share": 0.8},
        {"name": "sample, greedy, 1 rows", "copy_share": 0.1, "peak_share": 0.0},
    ]
    ceilings = {"copy_gb_per_s": 3000.0, "product_gflop_per_s": 700e3}
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"schema": "shoal.bench.kernels/1", "ceilings": ceilings, "figures": figures}))
    model = folder(tmp_path / "m", LLAMA_8B)
    measured = problem(model, "H100", calibrate=file)
    assert measured.pools[0].gpu.gb_s == 3000
    assert measured.pools[0].gpu.tflops == 700
    assert (measured.efficiency.bandwidth, measured.efficiency.flops) == (0.9, 0.8)
    stage = make_plan(measured).pick.costs.stages[0]
    assert stage.read_s == pytest.approx(2 * (8_030_261_248 - 128256 * 4096) / 2.7e12, rel=0.001)


def test_a_measured_engine_is_predicted_as_it_was_measured(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", LLAMA_8B)
    rows = [
        {"name": "decode, batch 1", "tokens": 63, "steps": 63, "step_ms": 7.5, "seconds": 0.4725},
        {"name": "decode, batch 8", "tokens": 504, "steps": 63, "step_ms": 8.0, "seconds": 0.504},
        {"name": "decode, batch 128", "tokens": 8064, "steps": 63, "step_ms": 14.0, "seconds": 0.882},
        {"name": "prefill, 512", "tokens": 2048, "steps": 1, "step_ms": 70.0, "seconds": 0.07},
    ]
    file = tmp_path / "engine.json"
    file.write_text(json.dumps({"schema": "shoal.bench.engine/1", "config": {}, "rows": rows}))
    stage = make_plan(problem(model, "H100", calibrate=file, prompt="512")).pick.costs.stages[0]
    context = 32 + 63 / 2
    assert stage.step_s(2048, 0, 0) == pytest.approx(0.070, rel=0.01)
    assert stage.step_s(0, 1, context) == pytest.approx(7.5e-3, rel=0.01)
    assert stage.step_s(0, 128, 128 * context) == pytest.approx(14e-3, rel=0.01)
    assert stage.step_s(0, 8, 8 * context) == pytest.approx(8e-3, rel=0.05)  # which nobody has told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "bench kernels"),
        ("{", "JSON|Expecting"),
        ('{"schema": "shoal.bench.serve/1"}', "bench engine"),
        ('{"schema": "shoal.bench.engine/1", "config": {"tensor_parallel_size": 2}}', "several ranks"),
        ('{"schema": "shoal.bench.engine/1", "rows": []}', "no row of decoding"),
        ('{"schema": "shoal.bench.engine/1", "config": {"model": "other"}}', "with other was measured"),
        ('{"schema": "shoal.bench.kernels/1", "config": {"device": "cpu"}}', "measured on cpu.*a GPU"),
        ('{"schema": "shoal.bench.kernels/1", "ceilings": CEILINGS, "figures": []}', "no products"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content.replace("CEILINGS", '{"copy_gb_per_s": 1, "product_gflop_per_s": 1}'))
    with pytest.raises(ConfigError, match=words):
        problem(folder(tmp_path / "m", LLAMA_8B), "H100", calibrate=file)


# Layers by speed


def test_layers_are_cut_by_the_speed_of_stages() -> None:
    cuts = cut_layers([1.0] * 30, stages=2, speeds=[2.0, 1.0])
    assert [len(cut) for cut in cuts] == [20, 10]
    assert [len(cut) for cut in cut_layers([1.0] * 30, stages=2, head=3.0, speeds=[2.0, 1.0])] == [22, 8]
    assert cut_layers([1.0] * 9, stages=3, speeds=[5.0] * 3) == cut_layers([1.0] * 9, stages=3)
