"""What a stranger writes into shoal.yaml: refused before anything starts, with the line of what is most to blame."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.config import load_config, served
from shoal.cluster.serve_config import deployed
from shoal.runtime.errors import ConfigError

ENGINE = "engine: {model: some/model}\n"


def refusal(folder: Path, text: str, **options: object) -> str:
    """What is said of it, without the file's name."""
    file = folder / "shoal.yaml"
    file.write_bytes(text.encode())
    with pytest.raises(ConfigError) as refused:
        load_config({}, file=file, **options)  # type: ignore[arg-type]
    return str(refused.value).replace(str(file), "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # What several fields make of each other.
        ("autoscaling:\n  max_replicas: 2\n  min_replicas: 3", ":4: autoscaling.min_replicas: min_replicas 3 is more"),
        (
            "variants:\n- name: a\n  autoscaling: {max_replicas: 1,\n    min_replicas: 2}",
            ":5: variants[0].autoscaling.min_replicas: min_replicas 2 is more than max_replicas 1",
        ),
        (
            "router:\n  ladder:\n  - {load: 2, shed: true}\n  - {load: 1, shed: true}",
            ":5: router.ladder[1].load: the ladder's loads are [2.0, 1.0]",
        ),
        ("router:\n  tenants:\n  - name: a\n  - name: a", ":5: router.tenants[1].name: two tenants have the name a"),
        ("rollout:\n  weights:\n    stable: 0", ":3: rollout.weights: all weights are 0"),
        (
            "rollout:\n  weights:\n    stable: 1\n    canry: 1\nvariants: [{name: canary}]",
            ":5: rollout.weights names the variant 'canry'; there is canary, stable",
        ),
        ("rollout:\n  shadow:\n    next: 0.5", ":4: rollout.shadow names the variant 'next'; there is stable"),
        ("variants:\n- name: stable", ":3: two variants or models have the name 'stable'"),
        (
            "variants:\n- name: a\nmodels:\n- name: a\n  engine: {model: b}",
            ":5: two variants or models have the name 'a'",
        ),
        ("models:\n- name: a\n  replicas: 1", ":3: the model 'a' would be served as 'some/model', as the main one is"),
        (
            "models:\n- name: a\n  engine: {model: x}\n- name: b\n  engine: {model: y}\n  served_model_name: [x]",
            ":7: the model 'b' would be served as 'x', as the model 'a' is",
        ),
        (
            "router:\n  served_model_name: [a, a]",
            ":3: served_model_name is ['a', 'a']: each name is one, and there once",
        ),
        (
            "router:\n  ladder:\n  - load: 1\n    model: b",
            ":5: router.ladder names the model 'b', and there is no other",
        ),
        ("server:\n  port: 9000\n  metrics_port: 9000", ":4: --metrics-port 9000 is --port, too"),
        ("server:\n  redis_url: http://h", ":3: redis_url cannot be used: it must begin with redis://"),
        ("server:\n  redis_password_file: /p", ":3: --redis-password-file /p is for a Redis of yours"),
        # Kinds that pydantic would let pass, and the schema would not.
        ("server:\n  port: '8001'", ":3: server.port is text ('8001') and must be a number; without quotes it is 8001"),
        ("server:\n  replicas: true", ":3: server.replicas is true or false (True) and must be a number"),
        ("server:\n  haproxy: 1", ":3: server.haproxy is a number (1) and must be true or false"),
        ("rollout: {weights: {stable: '1'}}", ":2: rollout.weights.stable is text ('1') and must be a number"),
        ("variants:\n- {name: a, replicas: '2'}", ":3: variants[0].replicas is text ('2') and must be a number"),
        ("server:\n  port: 1:30", ":3: server.port: "),  # 90 in YAML 1.1
        # Limits.
        ("server:\n  replicas: 99999999999", ":3: server.replicas: Input should be less than or equal to 10000"),
        ("server:\n  drain_timeout_s: .inf", ":3: server.drain_timeout_s: Input should be a finite number"),
        ("server:\n  node_labels: {a b: c}", ":3: server.node_labels.a b"),
        ("variants:\n- name: A_b", ":3: variants[0].name: String should match pattern"),
        ("variants:\n- name: " + 21 * "a", "lower-case letters, digits and hyphens, at most 20 in all"),
        ("variants: {name: a}", ":2: variants: must be a list and is a mapping"),
        ("server:\n  port:", ":3: server.port has no value: give it one, or leave the key out"),
        # What is hardly YAML.
        ("server:\n  yes: 1", ":3: the key yes is no text but bool: quote it"),
        ("5: 1", ":2: the key 5 is no text but int: quote it"),
        ("server:\n\tport: 1", ":3: not YAML"),
        ("---\nengine: {model: other}", ":2: not YAML: but found another document"),
        ("server:\r\n  prot: 1", ":3: unknown key server.prot; did you mean server.port?"),
        ("server:\n  host: a\x00b", ":3: not YAML: the character '\\x00' may not stand there"),
        ("? [a, b]\n: 1", ":2: not YAML"),
        ("engine: {model: other}", ":2: engine is given twice, first in line 1"),
    ],
)
def test_it_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, ENGINE + text + "\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no model: name a folder"),
        ("# nothing\n", "no model: name a folder"),
        ("engine:\n  model:\n", ":2: no model: name a folder"),
        ("hello", "the root is text; it must be a mapping with engine"),
        ("engine: {model: m, pp_layers: [4, 4]}", ":1: pp_layers names 2 stages, 4,4, and pipeline_parallel_size is 1"),
        ("engine: {model: m, pipeline_parallel_size: 2,\n  pp_layers: [9, 0]}", ":2: pp_layers is 9,0: a stage has at"),
        ("engine:\n  model: m\n  block_size: 48", ":3: engine.block_size: must be a power of two"),
        ("engine:\n  model: m\n  kv_cache_memory_gb: .inf", ":3: engine.kv_cache_memory_gb: Input should be a finite"),
        (
            "\ufeffengine: {model: m}\nserver: {prot: 1}",
            ":2: unknown key server.prot",
        ),  # with a mark that editors leave
    ],
)
def test_a_file_by_itself(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    file.write_bytes(b"engine:\n  model: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"shoal.yaml:2: not UTF-8"):
        load_config({}, file=file)


def test_a_variant_s_stages_are_held_against_what_it_inherits(tmp_path: Path) -> None:
    text = "engine: {model: m, pipeline_parallel_size: 2}\nvariants:\n- name: a\n  engine:\n    pp_layers: [1, 2, 3]\n"
    assert ":5: pp_layers names 3 stages, 1,2,3, and pipeline_parallel_size is 2" in refusal(tmp_path, text)
    text = "engine: {model: m, pipeline_parallel_size: 2, pp_layers: [3, 3]}\nvariants:\n- name: a\n"
    assert ":4: pp_layers names 2 stages, 3,3" in refusal(tmp_path, text + "  engine: {pipeline_parallel_size: 3}\n")


def test_numbers_are_as_people_write_them(tmp_path: Path) -> None:
    """`1e3` is text in YAML 1.1; a date is no model's name in neither."""
    file = tmp_path / "shoal.yaml"
    file.write_text(
        "engine: {model: 2026-11-22}\nrollout: {weights: {stable: 1e3}}\nserver: {drain_timeout_s: 1.5e+2}\n"
    )
    config = load_config({}, file=file)
    assert (config.engine.model, config.rollout.weights["stable"]) == ("2026-11-22", 1000)
    assert config.server.drain_timeout_s == 150


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server:\n  redis_url: none\n  port: 0", ":4: server.port is 0"),
        ("server: {redis_url: none}", "router.secret_file is missing"),
        ("server:\n  redis_url: embedded", ":3: server.redis_url is embedded"),
        ("server:\n  redis_url: redis://:hidden@h", ":3: server.redis_url has a password in it"),
        ("router:\n  secret_file: here", ":3: router.secret_file is here: say where it is on every node"),
        ("server: {redis_url: none}\nrouter:\n  api_keys: [hidden]", ":4: router.api_keys would lie open"),
    ],
)
def test_what_a_cluster_cannot_serve_has_its_line(tmp_path: Path, text: str, said: str) -> None:
    told = refusal(tmp_path, ENGINE + text + "\n", checks=(deployed,))
    assert said in told
    assert "hidden" not in told


def test_an_open_door_has_its_line_or_its_flag(tmp_path: Path) -> None:
    text = ENGINE + "server:\n  host: 0.0.0.0\n"
    assert ":3: host 0.0.0.0 without an API key" in refusal(tmp_path, text, checks=(served,))
    with pytest.raises(ConfigError, match=r"^--host: host 0\.0\.0\.0 without"):
        load_config({("server", "host"): "0.0.0.0"}, file=tmp_path / "shoal.yaml", checks=(served,))


CONFIG = (
    '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 99, '
    '"num_key_value_heads": 2, "num_hidden_layers": 3, "max_position_embeddings": 64}'
)


@pytest.mark.parametrize("command", ["show", "serve-config"])
@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("tensor_parallel_size: 5", ":4: --tensor-parallel-size 5: a llama model of 4 attention heads"),
        ("pipeline_parallel_size: 4", ":4: --pipeline-parallel-size 4: llama has 3 layers"),
        ("pp_layers: [2, 2]\n  pipeline_parallel_size: 2", ":4: --pp-layers 2,2: names 2 stages of 4 layers"),
    ],
)
def test_a_grid_that_the_model_has_not_is_refused_where_its_config_is_here(
    tmp_path: Path, command: str, grid: str, said: str
) -> None:
    """Weights need not be."""
    (tmp_path / "config.json").write_text(CONFIG)
    file = tmp_path / "shoal.yaml"
    others = "router: {secret_file: /s}\nserver: {redis_url: none}\n"
    file.write_text(f"engine:\n  model: {tmp_path}\n  dtype: auto\n  {grid}\n{others}")
    result = CliRunner().invoke(app, ["config", command, "--config", str(file)])
    assert isinstance(result.exception, ConfigError), result.output
    assert f"{file}{said}" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router:\n  secret_file: /no/such", ":3: router.secret_file /no/such: No such file or directory"),
        ("router:\n  api_key_file: /no/such", ":3: --api-key-file /no/such: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there_has_the_line_of_its_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    assert said in unserved(tmp_path, f"engine: {{model: {tmp_path}}}\n{text}\nserver: {{port: 0}}\n")


def unserved(folder: Path, text: str) -> str:
    """What `shoal serve` refuses, without the file's name."""
    file = folder / "shoal.yaml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(file)])
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception).replace(str(file), "")


def test_a_ca_that_is_not_there_has_the_line_of_the_url(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    server = "server:\n  port: 0\n  redis_url: rediss://h/0?ssl_ca_certs=/no/ca\n"
    assert ":4: --redis-url /no/ca: No such file or directory" in unserved(
        tmp_path, f"engine: {{model: {tmp_path}}}\n{server}"
    )


def test_a_model_that_is_not_here_has_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    text = f"server: {{port: 0}}\nengine: {{model: {tmp_path}}}\nmodels:\n- name: a\n  engine:\n    model: /no/such\n"
    assert ":6: model '/no/such': no such folder" in unserved(tmp_path, text)


def test_a_port_that_is_taken_has_its_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = unserved(tmp_path, f"{ENGINE}server:\n  port: {port}\n")
    assert f":3: can not listen on 127.0.0.1 port {port}: Address already in use" in said


def test_what_a_start_is_held_against_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing heavy is imported before Ray starts, once the model's config was read: a grid's check needs no torch."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where specs are remembered
    (tmp_path / "config.json").write_text(CONFIG)
    flags = {("engine", "model"): str(tmp_path), ("engine", "tensor_parallel_size"): 2, ("server", "port"): 0}
    code = (
        "import sys\n"
        "from shoal.cluster.config import load_config\n"
        "from shoal.cluster.preflight import HERE\n"
        f"load_config({flags!r}, checks=HERE)\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'fastapi') if name in sys.modules])\n"
    )
    said = [subprocess.check_output([sys.executable, "-P", "-c", code], text=True).strip() for _ in range(2)]
    assert "transformers" in said[0]
    assert said[1] == "[]"
