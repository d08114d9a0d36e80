"""The documentation says what is: its commands exist, its configs load, its links lead somewhere.

A fenced block `bash` holds commands that must parse: ours with their flags, others' by a short list. `bash cloud` and
`bash gpu` need what a test has not: of them only our own commands are parsed. Indented lines that begin with a command
of ours count as `bash`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from shoal.cluster.cli import app
from shoal.cluster.config import ShoalConfig, load_config
from shoal.router.config import RouterConfig

from .router.fakes import MODEL, Server

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "shoal"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *ROOT.glob("examples/**/*.md"),
]
EACH = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
SHELLS, KINDS = ("bash", "sh", "shell", "console"), ("bash", "bash cloud", "bash gpu")
OTHERS = {"export", "git", "grep", "helm", "kubectl", "nvidia-smi", "openssl", "pip", "prometheus", "promtool"}
OTHERS |= {"pytest", "ray", "redis-cli", "sed", "serve"}
FENCE = re.compile(r"^```(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
URL = re.compile(r"(?:(?:https?://)?(?:127\.0\.0\.1|localhost)(?::\d+)?|\$\{?SHOAL\}?)(/[^\s'\"?]*)")
OF_PROMETHEUS, DIGEST = "/api/v1/", "sha256:" + "0" * 64
COMMANDS: Any = typer.main.get_command(app)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(info string, text) of each fenced block, and of indented commands of ours."""
    yield from ((found[1].strip(), found[2]) for found in FENCE.finditer(page.read_text(encoding="utf-8")))
    for line in re.findall(r"^    ((?:shoal|curl|make) (?:.*\\\n)*.*)$", prose(page), re.MULTILINE):
        yield "bash", line


def commands(script: str) -> Iterator[list[str]]:
    """Each command's words, without what is assigned before it and where its output goes."""
    plain = re.sub("(^| )#.*$", "", script, flags=re.MULTILINE)
    for line in re.sub(r"'[^']*\n[^']*'", "'{}'", plain).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        for is_operator, words in groupby(lexer, lambda word: set(word) <= set("|&;")):
            command = [] if is_operator else list(words)
            while command and re.fullmatch(r"\w+=.*", command[0]):
                del command[0]
            if command:
                yield command[: next((i for i, word in enumerate(command) if word.startswith((">", "2>", "<"))), None)]


@pytest.fixture(scope="module")
def routes() -> list[str]:
    with Server(RouterConfig(served_model_name=(MODEL,))) as server:
        paths = server.get("/openapi.json").json["paths"]
    return [re.sub(r"\\{.*?\\}", ".+", re.escape(path)) for path in paths]


def check(words: list[str], kind: str, routes: list[str]) -> None:
    """Raises what our command line does, or AssertionError."""
    program, *rest = words
    if program == "shoal":
        command = COMMANDS
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        if rest != ["--help"]:
            command.make_context(program, rest)
    elif program.startswith("python") and rest[:1] == ["-m"] and rest[1].startswith("shoal."):
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif kind == "bash" and program == "curl":
        for path in URL.findall(" ".join(rest)):
            assert path.startswith(OF_PROMETHEUS) or any(re.fullmatch(route, path) for route in routes), path
    elif kind == "bash" and program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), rest
    elif kind == "bash":
        assert program in OTHERS, f"who is {program}?"


@EACH
def test_commands_exist(page: Path, routes: list[str]) -> None:
    for kind, script in blocks(page):
        if not kind.startswith(SHELLS):
            continue
        assert kind in KINDS
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, (script, checked.stderr)
        for words in commands(script):
            try:
                check(words, kind, routes)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                pytest.fail(f"{shlex.join(words)}: {error!r}")


@EACH
def test_commands_in_prose_exist(page: Path) -> None:
    """Of those within backquotes, the names: what else stands there need not be whole."""
    for first, second in re.findall(r"`shoal ([a-z][a-z-]*)(?: ([a-z][a-z|-]*))?", prose(page)):
        assert first in COMMANDS.commands, first
        below = getattr(COMMANDS.commands[first], "commands", {})
        assert not below or not second or set(second.split("|")) <= set(below), f"{first} {second}"


@EACH
def test_configs_load(page: Path, tmp_path: Path) -> None:
    """As shoal.yaml, or with keys of the chart's own as its values."""
    values = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    for script in (script for kind, script in blocks(page) if kind == "yaml"):
        tree = yaml.safe_load(script.replace("sha256:...", DIGEST))
        if isinstance(tree, dict) and tree.keys() <= ShoalConfig.model_fields.keys():
            (tmp_path / "shoal.yaml").write_text(yaml.safe_dump(tree))
            load_config({} if "engine" in tree else {("engine", "model"): "m"}, file=tmp_path / "shoal.yaml")
        elif isinstance(tree, dict) and tree.keys() <= values["properties"].keys():
            jsonschema.validate(tree, values)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub("`[^`\n]*`", "code", prose(page))):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert "://" in path or there.exists(), target
        assert not anchor or "://" in path or anchor in anchors(there), target


def test_the_chart_s_notes_name_commands() -> None:
    notes = re.sub("{{.*?}}", "x", (CHART / "templates" / "NOTES.txt").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = re.findall(r"^  (?=\w)(?:KEY=\$\()?(.*?)\)?$", notes, re.MULTILINE)
    programs = {words[0] for line in lines for words in commands(line)}
    assert {"helm", "kubectl"} <= programs <= {"helm", "kubectl", "curl", "base64"}
