"""The commands of the documentation that need neither a server nor a cluster are run, as they stand there.

Of the others the test is named that runs them; `bash cloud` and `bash gpu` need what no test has.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from shoal.cluster.cli import app

from .cluster.plans import QWEN3_8B, folder
from .helm.chart import CHART, helm, needs_helm
from .test_docs import COMMANDS, EACH, PAGES, ROOT, blocks, commands

pytestmark = pytest.mark.slow

HUB_ID = "Qwen/Qwen3-8B"
RUN = ("plan", "config", "ray-up", "keys", "version")
RUN_ELSEWHERE = {
    "serve": "cluster/test_serve.py",
    "deploy": "cluster/test_deploy.py",
    "bench": "cluster/test_bench_serve.py",
    "quantize": "cluster/test_quantize_cli.py",
    "simulate": "cluster/test_simulate.py",
    "simulate-autoscaling": "cluster/test_autoscale_simulate.py",
    "drain-node": "cluster/test_change_without_loss.py",
    "doctor": "cluster/test_cli.py",
    "demo": "cluster/test_cli.py",
    "generate": "cluster/test_cli.py",
    "chat": "cluster/test_client.py",
    "perplexity": "cluster/test_quantize_cli.py",
}


def ours(page: Path) -> list[list[str]]:
    """The `shoal` and `helm` commands of its `bash` blocks, in their order."""
    return [
        words
        for kind, script in blocks(page)
        if kind == "bash"
        for words in commands(script)
        if words[0] in ("shoal", "helm")
    ]


def test_every_command_is_run_here_or_by_a_test_that_is_there() -> None:
    assert set(RUN) | set(RUN_ELSEWHERE) == set(COMMANDS.commands)
    for file in RUN_ELSEWHERE.values():
        assert (Path(__file__).parent / file).exists(), file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache that has the config of the model which the pages speak of."""
    cache = tmp_path / "hub"
    there = cache / f"models--{HUB_ID.replace('/', '--')}"
    (there / "snapshots").mkdir(parents=True)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text("0")
    folder(there / "snapshots" / "0", QWEN3_8B)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)


@EACH
def test_commands_do_what_the_page_says(page: Path, hub: None) -> None:
    for words in ours(page):
        if words[0] == "shoal" and words[1] in RUN:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{shlex.join(words)}: {result.exception}"
            assert result.output


@needs_helm
@EACH
def test_charts_are_rendered_with_the_values_of_the_page(page: Path, tmp_path: Path) -> None:
    examples = [script for kind, script in blocks(page) if kind == "yaml"]
    for words in (words for words in ours(page) if words[:2] == ["helm", "template"]):
        for example in examples:
            rendered = [
                str(CHART) if word == "helm/shoal" else "-" if word == "values.yaml" else word for word in words
            ]
            done = helm(*rendered[1:], stdin=example)
            assert done.returncode == 0, done.stderr
            assert "RayService" in [each["kind"] for each in yaml.safe_load_all(done.stdout) if each]


def test_the_pages_say_what_a_stranger_would_do_first() -> None:
    """So that the tests above have something to run."""
    run = {words[1] for page in PAGES for words in ours(page) if words[0] == "shoal"}
    assert {"plan", "config", "ray-up", "keys"} <= run
    assert re.search(r"```bash\nhelm template ", (ROOT / "docs" / "DEPLOY_HELM.md").read_text(encoding="utf-8"))
