"""`shoal bench engine`, `kernels` and `startup`: every figure is there, of a toy model and a stand-in for a server."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from shoal.cluster import bench_startup
from shoal.cluster.bench_cases import cases, copies, make_batch
from shoal.cluster.bench_kernels import Case, CpuTimer, KernelPlan, measure
from shoal.cluster.bench_startup import serve_command
from shoal.cluster.cli import app
from shoal.runtime.errors import ConfigError, EngineError
from shoal.runtime.models.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing in it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def test_the_engine_is_timed_at_each_batch_size(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    flags = ["--batch", "1,3", "--input-tokens", "9", "--output-tokens", "12", "--prefill-tokens", "30"]
    own = ["--dtype", "float32", "--kv-cache-memory-gb", "0.01", "--json", str(file)]
    result = CliRunner().invoke(app, ["bench", "engine", str(model), *flags, *own], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(file.read_bytes())
    assert found["schema"] == "shoal.bench.engine/1"
    # A row's first token is there when the clock starts; prompts of a prefill count as they are read.
    assert [(row["name"], row["tokens"]) for row in found["rows"]] == [
        ("decode, batch 1", 11),
        ("decode, batch 3", 33),
        ("prefill, 30", 120),
    ]
    for row in found["rows"]:
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["name"] in result.output
    assert found["peak_bytes"]["process"] > 0
    assert "peak memory: process" in result.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "1,9", "--max-num-seqs", "8"], "--batch 9: the engine runs 8 at once (--max-num-seqs)"),
        (["--input-tokens", "60", "--output-tokens", "10"], "70 together, and the longest sequence has 64"),
        (["--batch", "200", "--kv-cache-memory-gb", "0.001"], "the KV cache has room for"),
    ],
)
def test_what_the_engine_has_no_room_for(model: Path, flags: list[str], words: str) -> None:
    own = ["--dtype", "float32", "--input-tokens", "9", "--output-tokens", "12"]
    result = CliRunner().invoke(app, ["bench", "engine", str(model), *own, *flags])
    assert isinstance(result.exception, ConfigError), result.output
    assert words in str(result.exception)


TOY = KernelPlan("cpu", "bfloat16", (1, 3), (40,), 0.001)


def toy_spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_config({**LlamaConfig(**SIZES).to_dict(), **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_operation_runs_at_the_models_shapes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.bench_cases.COLD_BYTES", 1 << 16)
    with torch.inference_mode():
        figures, ceilings = measure(toy_spec(), TOY, torch.device("cpu"), dtype)
    assert min(ceilings) > 0
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names)
    for kind in ("add and norm", "rotate and store", "activation", "decode attention", "prefill attention", "sample"):
        assert any(name.startswith(kind) for name in names)
    assert any(name.startswith("products of a layer, dense") for name in names)
    assert any("4-bit" in name for name in names) == (dtype is torch.bfloat16)
    for figure in figures:
        assert figure.us > 0
        assert figure.copy_share == pytest.approx(figure.gb_per_s / ceilings[0])


def test_families_without_a_gate_or_rms_norms() -> None:
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 128,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 1,
        "n_positions": 64,
    }
    with torch.inference_mode():
        made = list(
            cases(
                ModelSpec.from_config(config), KernelPlan("cpu", "", (1,), (8,), 0), torch.device("cpu"), torch.float32
            )
        )
        for case in made:
            case.calls[0]()


def test_bytes_and_flops_are_those_of_the_roofline() -> None:
    with torch.inference_mode():
        found = {case.name: case for case in cases(toy_spec(), TOY, torch.device("cpu"), torch.bfloat16)}
    decode = found["decode attention, 3 x 40"]
    assert decode.bytes == 3 * 40 * 2 * (2 * 16) * 2 + 2 * 3 * 4 * 16 * 2  # keys and values; queries and results
    assert decode.flops == 4 * 3 * 40 * 4 * 16
    assert found["prefill attention, 40"].flops == 4 * (40 * 41 / 2) * 4 * 16
    weights = (64 + 64) * 64 + 64 * 64 + 2 * 96 * 64 + 64 * 96
    assert found["products of a layer, dense, 3 tokens"].flops == 2 * 3 * weights


def test_an_8_bit_cache_is_half_the_bytes() -> None:
    plan = KernelPlan("cpu", "bfloat16", (3,), (40,), 0.001, kv_cache_dtype="int8")
    with torch.inference_mode():
        found = {case.name: case for case in cases(toy_spec(), plan, torch.device("cpu"), torch.bfloat16)}
        decode = found["decode attention, 3 x 40"]
        decode.calls[0]()
    assert decode.bytes == 3 * 40 * 2 * 2 * (16 + 4) + 2 * 3 * 4 * 16 * 2  # with a scale a token and head


def test_copies_are_more_than_a_cache_holds() -> None:
    assert copies(1e9) == 1
    assert copies(2**25) * 2**25 == 2**28
    assert copies(10) == 32  # small ones are warm in a model, too


def test_a_timer_goes_round_over_all_calls() -> None:
    called = []
    timer = CpuTimer(0.0)
    assert timer.us([lambda: called.append(1), lambda: called.append(2)]) > 0
    assert called == [1, 2] * (len(called) // 2)
    assert Case("x", [], 1.0).flops == 0


def test_pages_of_a_batch_are_nobody_elses() -> None:
    batch = make_batch([1, 5], [70, 40], torch.device("cpu"))
    pages = [*batch.block_table_SP[0, :3].tolist(), *batch.block_table_SP[1, :2].tolist()]
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert batch.num_decodes == 1
    assert batch.query_start_S1.tolist() == [0, 1, 6]


SERVER = """
import http.server, json, signal, sys, time
print("[  0.0 s] starting Ray", file=sys.stderr, flush=True)
if sys.argv[2] == "dies":
    sys.exit("no memory")
polls = {"/health": 0, "/ready": 0}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in polls:
            polls[self.path] += 1
            enough = polls["/ready"] > 2 or self.path == "/health"
            if polls["/ready"] == 1:
                print("[  1.5 s] Loading weights: 4 layers", file=sys.stderr)
                print("[  2.0 s] Loading weights: 50 %, 2/4 layers", file=sys.stderr, flush=True)
            return self.reply(200 if enough else 503, b"{}")
        self.reply(200, json.dumps({"data": [{"id": "m"}]}).encode())
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.reply(200, b'data: {"choices": [{"text": "a"}]}\\n\\ndata: [DONE]\\n\\n')
    def reply(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A server of the standard library's in place of `shoal serve`; what it is given besides the port."""
    extra = [""]

    def command(model: str, overrides: object, port: int) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), *extra]

    monkeypatch.setattr(bench_startup, "serve_command", command)
    return extra


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_starts_are_timed_from_outside(stand_in: list[str], tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    command = ["bench", "startup", "some/model", "--runs", "2", "--port", str(free_port()), "--json", str(file)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    starts = json.loads(file.read_bytes())["starts"]
    assert len(starts) == 2
    for start in starts:
        assert 0 < start["health_s"] <= start["ready_s"] <= start["first_token_s"]
        assert start["stop_s"] > 0
        assert set(start["stages"]) == {"starting Ray", "Loading weights"}  # however many lines a stage has
        assert start["stages"]["starting Ray"] == 1.5
    for name in ("/health 200", "/ready 200", "first token", "SIGTERM to exit", "Loading weights", "median"):
        assert name in result.output


def test_a_start_that_fails_says_why(stand_in: list[str]) -> None:
    stand_in[0] = "dies"
    result = CliRunner().invoke(app, ["bench", "startup", "some/model", "--port", str(free_port())])
    assert isinstance(result.exception, EngineError)
    assert "ended with 1 before /health was 200" in str(result.exception)
    assert "no memory" in str(result.exception)


def test_flags_are_passed_on_to_the_server() -> None:
    overrides = {
        ("server", "port"): 9,
        ("server", "haproxy"): False,
        ("engine", "dtype"): "float32",
        ("engine", "pp_layers"): ["1,1"],
        ("engine", "enable_prefix_caching"): True,
    }
    command = serve_command("m", overrides, 1234)
    assert command[command.index("serve") :] == [
        *("serve", "m", "--no-haproxy", "--dtype", "float32", "--pp-layers", "1,1", "--enable-prefix-caching"),
        *("--port", "1234"),
    ]
