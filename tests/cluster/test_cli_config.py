"""`shoal config`, the schema and the page made from it, and refusals that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from shoal.cluster.cli import app
from shoal.cluster.config import load_config
from shoal.cluster.config_doc import SCHEMA_FILE, document, rendered, schema
from shoal.cluster.serve_config import serve_config
from shoal.runtime.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
AGAIN = "write it anew: python -m shoal.cluster.config_doc"
DIGEST = "sha256:" + "0" * 64
WHOLE = f"""\
engine:
  model: &main some/model
  max_num_seqs: 4
router:
  api_keys: [hidden-key]
  secret: {"hidden" * 8}
  tenants:
    - name: research
      keys: [{DIGEST}]
  ladder:
    - {{load: 2, shed: true}}
server:
  redis_url: redis://:hidden@there
  port: 9000
autoscaling: {{max_replicas: 4}}
variants:
  - name: canary
    engine:
      max_num_seqs: 8
models:
  - name: other
    engine: {{model: other/model, speculative_model: *main}}
rollout:
  weights: {{stable: 95, canary: 5}}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "shoal.yaml"
    file.write_text(text)
    return file


def refusal(folder: Path, text: str) -> list[str]:
    """The problems, without the file's name."""
    file = write(folder, text)
    with pytest.raises(ConfigError) as refused:
        load_config({("engine", "model"): "m"}, file=file)
    return [line.removeprefix(str(file)) for line in str(refused.value).splitlines()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("router:\n  max_inflight: 3", ":2: unknown key router.max_inflight; did you mean router.max_in_flight?"),
        (
            "router:\n  tenants:\n  - name: a\n  - name: b\n    kyes: []",
            ":5: unknown key router.tenants[1].kyes; did you mean router.tenants[1].keys?",
        ),
        (
            "router:\n  ladder: [{load: 1,\n    shedd: true}]",
            ":3: unknown key router.ladder[0].shedd; did you mean router.ladder[0].shed?",
        ),
        (
            "variants:\n- name: c\n  engine:\n    dtyp: auto",
            ":4: unknown key variants[0].engine.dtyp; did you mean variants[0].engine.dtype?",
        ),
        ("\n\nmodels:\n- nam: c", ":4: unknown key models[0].nam; did you mean models[0].name?"),
        ("rollout:\n  rollback: {window: 1}", ":2: unknown key rollout.rollback.window"),
        ("autoscaling:\n  min_replicas: 1", ":1: autoscaling.max_replicas is missing"),
        ("server:\n  host: x\n  port: 70000", ":3: server.port: Input should be less than or equal to 65535"),
        ("rollout:\n  weights:\n    canary: -1", ":3: rollout.weights.canary: Input should be greater"),
        ("models: 3", ":1: models: must be a list and is a number (got 3)"),
        ("server:\n  port: 1\n  host: x\n  port: 2", ":4: port is given twice, first in line 2"),
        ("variants:\n- {name: a, name: b}", ":2: name is given twice, first in line 2"),
        ("server: &a\n  host: *a", ":1: an anchor within itself"),
        ("engine:\n  model: [", ":3: not YAML"),
        ("server: {<<: {prot: 1}}", ":1: unknown key server.prot; did you mean server.port?"),
    ],
)
def test_a_refusal_names_the_line(tmp_path: Path, text: str, said: str) -> None:
    assert any(problem.startswith(said) for problem in refusal(tmp_path, text + "\n")), refusal(tmp_path, text + "\n")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = "engine:\n  max_num_seqs: 0\nserver:\n  prot: 1\n  replicas: none\n"
    assert sorted(problem.split(": ")[0] for problem in refusal(tmp_path, text)) == [":2", ":4", ":5"]


@pytest.mark.parametrize("where", ["router: {api_keys: hidden}", "router: {tenants: [{name: a, keys: [hidden]}]}"])
def test_secrets_are_in_no_refusal(tmp_path: Path, where: str) -> None:
    (problem,) = refusal(tmp_path, where)
    assert ":1: router." in problem
    assert "got" not in problem
    assert "hidden" not in problem


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "x: &base {max_replicas: 3}\n"
    assert "unknown key x" in refusal(tmp_path, text)[0]
    text = "autoscaling: &base {max_replicas: 3}\nvariants:\n- name: c\n  autoscaling: {<<: *base, min_replicas: 2}\n"
    (canary,) = load_config({("engine", "model"): "m"}, file=write(tmp_path, text)).variants
    assert canary.autoscaling is not None
    assert (canary.autoscaling.min_replicas, canary.autoscaling.max_replicas) == (2, 3)


def show(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_says_where_each_value_comes_from(tmp_path: Path) -> None:
    file = write(tmp_path, WHOLE)
    printed = show("show", "--config", str(file), "--port", "9001", "-tp", "2")
    for line in (
        f"  model: some/model  # {file}:2\n",
        f"  max_num_seqs: 4  # {file}:3\n",
        "  tensor_parallel_size: 2  # --tensor-parallel-size\n",
        "  dtype: auto  # default\n",
        f"    - name: research  # {file}:8\n",
        "  port: 9001  # --port\n",
        f"  max_replicas: 4  # {file}:15\n",
        f"      max_num_seqs: 8  # {file}:19\n",
        f"  weights: {{canary: 5.0, stable: 95.0}}  # {file}:24\n",
    ):
        assert line in printed
    assert "hidden-key" not in printed
    assert "hiddenhidden" not in printed
    assert ":hidden@" not in printed
    assert DIGEST not in printed
    assert "model: other/model  # MODEL" in show("show", "other/model")


def test_what_show_prints_is_a_config(tmp_path: Path) -> None:
    """It can be written to a file and served, where it hides nothing."""
    plain = WHOLE.replace("  api_keys: [hidden-key]\n", "").replace(f"  secret: {'hidden' * 8}\n", "")
    plain = plain.replace(f"\n      keys: [{DIGEST}]", "").replace("  redis_url: redis://:hidden@there\n", "")
    file = write(tmp_path, plain)
    config = load_config({}, file=file)
    (tmp_path / "again.yaml").write_text(show("show", "--config", str(file)))
    assert load_config({}, file=tmp_path / "again.yaml") == config


def test_serve_config_prints_what_is_applied(tmp_path: Path) -> None:
    """And no secret with it."""
    file = ROOT / "examples" / "canary.yaml"
    assert yaml.safe_load(show("serve-config", "--config", str(file))) == serve_config(load_config({}, file=file))
    with pytest.raises(ConfigError, match=r"router\.secret"):
        show("serve-config", "--config", str(write(tmp_path, WHOLE)))


def test_the_schema_is_shipped_and_printed() -> None:
    assert SCHEMA_FILE.read_text(encoding="utf-8") == rendered(schema()), AGAIN
    assert json.loads(show("schema")) == schema()


def test_the_page_is_the_schema_s() -> None:
    assert (ROOT / "docs" / "CONFIGURATION.md").read_text(encoding="utf-8") == document(), AGAIN


@pytest.mark.parametrize(
    ("old", "new"),
    [("max_num_seqs: 4", "max_num_sqs: 4"), ("port: 9000", "port: 90000"), ("name: canary", "nam: canary")],
)
def test_editors_find_what_loading_refuses(tmp_path: Path, old: str, new: str) -> None:
    Draft202012Validator.check_schema(schema())
    editor = Draft202012Validator(schema())
    assert editor.is_valid(yaml.safe_load(WHOLE))
    load_config({}, file=write(tmp_path, WHOLE))
    assert not editor.is_valid(yaml.safe_load(WHOLE.replace(old, new)))
    assert refusal(tmp_path, WHOLE.replace(old, new))
