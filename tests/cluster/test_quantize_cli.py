"""`shoal quantize` and `shoal perplexity` as an operator meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from shoal.cluster.cli import app, main
from shoal.runtime.errors import ConfigError

from ..tiny import byte_tokenizer

SIZES = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES)).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def _keep_signals() -> object:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield
    for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(signum, handler)


def refusal(*args: str) -> str:
    result = CliRunner().invoke(app, ["quantize", *args])
    assert isinstance(result.exception, ConfigError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_a_run_prints_what_it_lost_and_reports_it(model: Path, tmp_path: Path) -> None:
    out, report, text = tmp_path / "out", tmp_path / "report.json", tmp_path / "text"
    text.write_text("A short text to go by.\n" * 20)
    args = ["quantize", str(model), "--format", "int4", "--out", str(out), "--group-size", "32", "--symmetric"]
    done = CliRunner().invoke(app, [*args, "--calibration", str(text), "--report", str(report)])
    assert done.exit_code == 0, done.output
    for words in ("14 matrices of 2 layers to int4 (pack-quantized, groups of 32)", "perplexity", "KL", f"serve {out}"):
        assert words in done.output
    written = json.loads(report.read_text())
    assert written["bytes_after"] < written["bytes_before"]
    assert written["comparison"]["kl_mean"] > 0
    assert f"{written['comparison']['other_perplexity']:.3f}" in done.output
    done = CliRunner().invoke(app, ["perplexity", str(model), str(out)])
    assert f"-> {written['comparison']['other_perplexity']:.3f}" in done.output
    alone = CliRunner().invoke(app, ["perplexity", str(out), "--text", str(text)])
    assert "on 456 tokens" in alone.output, alone.output


def test_bad_input_is_refused_with_the_flag(model: Path, tmp_path: Path) -> None:
    start = [str(model), "--out", str(tmp_path / "out"), "--format"]
    assert "--format 'int3'" in refusal(*start, "int3")
    assert "--group-size 48" in refusal(*start, "int4", "--group-size", "48")
    text = tmp_path / "text"
    assert f"--calibration {text}: [Errno 2]" in refusal(*start, "int8", "--calibration", str(text))
    text.write_bytes(b" \n")
    assert f"--calibration {text}: there is no text" in refusal(*start, "int8", "--calibration", str(text))
    text.write_bytes(b"\xff\xfe")
    assert f"--calibration {text}: 'utf-8' codec" in refusal(*start, "int8", "--calibration", str(text))
    assert "--report" in refusal(*start, "int8", "--report", str(tmp_path / "no" / "report"))
    assert "no such folder" in refusal(str(tmp_path / "gone"), *start[1:], "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["text"]


def test_a_run_that_is_stopped_leaves_no_trace(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", "from shoal.cluster.cli import main; main()", "quantize", str(model)]
    long = tmp_path / "long"
    long.write_text("words and more words " * 4000)
    out = tmp_path / "out"
    args = ["--format", "int4", "--out", str(out), "--calibration", str(long)]
    run = subprocess.Popen([*command, *args], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.01)
    run.terminate()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["long"]


def test_a_refusal_is_one_line_and_exit_code_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    monkeypatch.setattr(sys, "argv", ["shoal", "quantize", str(model), "--format", "int8", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    line = f"shoal: --out {tmp_path} exists and is not an empty folder: name another one, or remove it\n"
    assert capsys.readouterr().err == line
