"""The image as far as it can be judged without building it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shoal.cluster.ray_env import cluster_environment

from .chart import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HADOLINT = Path(sys.prefix) / "bin" / "hadolint"


def instructions() -> list[tuple[str, str]]:
    """(FROM, its arguments), ...; comments left out, continued lines joined."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def commands() -> list[list[str]]:
    """All that RUN runs, in words."""
    return [shlex.split(command) for run in of("RUN") for command in run.split("&&")]


@pytest.mark.skipif(not HADOLINT.exists(), reason=f"there is no {HADOLINT}: `make dev` brings it where it can")
def test_hadolint() -> None:
    done = subprocess.run([str(HADOLINT), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_is_pinned_and_the_same_in_all_stages() -> None:
    (base,) = of("ARG")
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d", base)
    assert of("FROM") == ["${BASE} AS build", "${BASE}"]


def test_it_runs_as_nobody_special_and_without_a_shell() -> None:
    assert of("USER") == ["1000"]  # Kubernetes cannot tell that a name is not root's
    after = [name for name, _ in instructions()][[name for name, _ in instructions()].index("USER") :]
    assert "COPY" not in after
    assert ["useradd", "--uid", "1000", "--create-home", "shoal"] in commands()
    assert json.loads(of("ENTRYPOINT")[0]) == ["shoal"]
    assert isinstance(json.loads(of("CMD")[0]), list)


def test_nothing_secret_and_nothing_stale_is_left_in_it() -> None:
    assert not re.search(r"(?i)(token|password|secret|key)=(?!token\b)", TEXT)
    for run in of("RUN"):
        if "apt-get install" in run:
            assert "rm -rf /var/lib/apt/lists/*" in run
            assert "--no-install-recommends" in run
    assert "ADD" not in {name for name, _ in instructions()}
    assert "latest" not in TEXT


def test_the_environment_is_a_nodes() -> None:
    settings = dict(word.split("=", 1) for word in shlex.split(of("ENV")[-1]))
    wanted = cluster_environment(Path("/tmp/shoal"), Path("/opt/shoal/haproxy"))
    assert {name: value for name, value in settings.items() if name != "PATH"} == wanted


def test_what_is_copied_is_what_the_wheel_is_made_of() -> None:
    copied = {source for rest in of("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    folders = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    files = {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert copied == folders | files
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_pip_installs_the_wheel_and_what_it_asks_for() -> None:
    pip = [words for words in commands() if words[0] == "pip"]
    assert [words[1] for words in pip] == ["wheel", "install"]
    assert pip[0][-1] == "."
    assert pip[1][2:] == ["--no-cache-dir", "--constraint", "constraints.txt", "/wheels/*.whl"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {pin.name: pin for pin in map(Requirement, (line for line in lines if line and not line.startswith("#")))}
    for asked in map(Requirement, PROJECT["project"]["dependencies"]):
        if asked.name in pins:
            (version,) = (each.version for each in pins[asked.name].specifier)
            assert asked.specifier.contains(version), f"{asked.name} {version}"
    assert {"torch", "ray", "transformers"} <= set(pins)
