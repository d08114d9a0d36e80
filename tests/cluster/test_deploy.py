"""`shoal deploy`: what it would change, what it refuses, and a real cluster that changes under a running answer."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.config import load_config
from shoal.cluster.deploy import DeployError, Kind, check_cluster, compare, follow, message_of, run_deploy
from shoal.cluster.preflight import free_port
from shoal.cluster.processes import adopting_orphans
from shoal.cluster.progress import Progress
from shoal.cluster.ray_env import ray_environment
from shoal.cluster.serve_config import serve_config
from shoal.runtime.errors import ConfigError, StartupError

from ..tiny import tiny_model

SECRET = "s" * 40


def config_of(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "engine": {"model": "org/model"},
        "router": {"secret_file": "/etc/shoal/secret"},
        "server": {"redis_url": "none"},
    }
    return changed(tree, changes)


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The tree with changes in its sections."""
    for section, value in changes.items():
        before = tree.get(section, {})
        tree[section] = before | value if isinstance(value, dict) else value
    return tree


def wanted_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    file = tmp_path / "shoal.yaml"
    file.write_text(json.dumps(config_of(**changes)))
    return serve_config(load_config({}, file=file))


def details_of(wanted: dict[str, Any], status: str = "RUNNING") -> dict[str, Any]:
    """What Serve says of itself once it was told `wanted`."""
    apps = {
        app["name"]: {"status": status, "deployed_app_config": app, "deployments": {}} for app in wanted["applications"]
    }
    return {"applications": apps, "http_options": wanted["http_options"]}


CANARY = [{"name": "canary", "engine": {"max_num_seqs": 8}}]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"server": {"replicas": 2}}, {"shoal-stable": (Kind.IN_PLACE, "num_replicas 1 -> 2")}),
        ({"engine": {"max_num_seqs": 9}}, {"shoal-stable": (Kind.REPLACED, "engine.max_num_seqs unset -> 9")}),
        (
            {"autoscaling": {"max_replicas": 3}},
            {"shoal-stable": (Kind.REPLACED, "autoscaling policy")},  # Serve takes the policy for code
        ),
        ({"router": {"max_n": 3}}, {"shoal": (Kind.REPLACED, "router.max_n unset -> 3")}),
        (
            {"variants": CANARY, "rollout": {"weights": {"stable": 1, "canary": 1}}},
            {
                "shoal": (Kind.IN_PLACE, "user_config.parts, user_config.rollout.weights"),
                "shoal-canary": (Kind.ADDED, ""),
            },
        ),
    ],
)
def test_what_would_change(tmp_path: Path, change: dict[str, Any], expected: dict[str, Any]) -> None:
    before, after = wanted_of(tmp_path), wanted_of(tmp_path, **change)
    changes = {
        app: (kind, words) for app, kind, words in compare(details_of(before), after) if kind is not Kind.UNCHANGED
    }
    assert changes == expected


def test_what_is_there_no_more_is_removed_and_what_is_new_added(tmp_path: Path) -> None:
    with_canary, without = wanted_of(tmp_path, variants=CANARY), wanted_of(tmp_path)
    assert ("shoal-canary", Kind.REMOVED, "") in list(compare(details_of(with_canary), without))
    assert {kind for _, kind, _ in compare({"applications": {}}, without)} == {Kind.ADDED}


def test_others_applications_and_another_port_are_not_touched_in_silence(tmp_path: Path) -> None:
    wanted = wanted_of(tmp_path)
    details = details_of(wanted)
    check_cluster(details, wanted)
    check_cluster({"applications": {}, "http_options": None}, wanted)
    with pytest.raises(ConfigError, match=r"server.port is 9000.*8000"):
        check_cluster(details, wanted_of(tmp_path, server={"port": 9000}))
    details["applications"]["theirs"] = {}
    with pytest.raises(ConfigError, match="theirs"):
        check_cluster(details, wanted)


def test_a_failure_is_told_in_our_own_words() -> None:
    traceback = "File \"x.py\"\nshoal.runtime.errors.ConfigError: model '/nowhere': no such folder\n"
    app = {"status": "DEPLOY_FAILED", "message": "Failed", "deployments": {"replica": {"message": traceback}}}
    assert message_of(app) == "model '/nowhere': no such folder"
    assert message_of({"status": "DEPLOYING", "message": "", "deployments": {}}) == "DEPLOYING"


class Scripted:
    """A cluster that says one thing after the other, and the last one for ever."""

    def __init__(self, *details: dict[str, Any]) -> None:
        self._details = list(details)

    def get_serve_details(self) -> dict[str, Any]:
        return self._details.pop(0) if len(self._details) > 1 else self._details[0]

    def deploy_applications(self, config: dict[str, Any]) -> None: ...


def test_it_is_over_when_all_run_and_the_removed_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.cluster.deploy.POLL_S", 0.0)
    with_canary, without = wanted_of(tmp_path, variants=CANARY), wanted_of(tmp_path)
    changes = list(compare(details_of(with_canary), without))
    cluster = Scripted(details_of(with_canary, "DEPLOYING"), details_of(with_canary), details_of(without))
    with Progress() as progress:
        follow(cluster, changes, progress, timeout_s=60)
        assert cluster.get_serve_details() == details_of(without)
        with pytest.raises(DeployError, match="shoal-stable: DEPLOY_FAILED"):
            follow(Scripted(details_of(without, "DEPLOY_FAILED")), changes, progress, timeout_s=60)
        with pytest.raises(DeployError, match="--startup-timeout-s"):
            follow(Scripted(details_of(without, "DEPLOYING")), changes, progress, timeout_s=0)


def test_no_cluster_and_no_address(tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    file.write_text(json.dumps(config_of()))
    config = load_config({}, file=file)
    with pytest.raises(StartupError, match="no Ray cluster answers at"):
        run_deploy(config, address=f"http://127.0.0.1:{free_port('127.0.0.1', 0)}", dry_run=True, wait=False)
    with pytest.raises(ConfigError, match="--address"):
        run_deploy(config, address="ray://there", dry_run=True, wait=False)


class Cluster:
    """A Ray of its own, and `shoal deploy` to it. Nothing is served yet."""

    script = (
        "import sys, ray\n"
        "ray.init(address='local', num_cpus=8, include_dashboard=True, dashboard_host='127.0.0.1',\n"
        "         dashboard_port=int(sys.argv[1]), log_to_driver=False, object_store_memory=10**8)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port, dashboard = free_port("127.0.0.1", 0), free_port("127.0.0.1", 0)
        self._address = f"http://127.0.0.1:{dashboard}"
        self.environment: dict[str, str] = {**os.environ, "HOME": str(home), **ray_environment(home, haproxy=False)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.script, str(dashboard)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment,
            text=True,
        )
        assert self._process.stdout is not None
        assert "up" in self._process.stdout.readline()
        (home / "secret").write_text(SECRET)
        self.model = tiny_model(home / "model")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def deploy(self, *flags: str, code: int = 0, environment: dict[str, str] | None = None, **changes: Any) -> str:
        """What it printed."""
        tree = config_of(
            engine={
                "model": str(self.model),
                "device": "cpu",
                "dtype": "float32",
                "deterministic": True,
                "max_model_len": 8000,
                "kv_cache_memory_gb": 0.1,
                "num_threads": 1,
            },
            router={"secret_file": str(self.home / "secret"), "served_model_name": ["tiny"], "cache_mode": "off"},
            server={"port": self.port, "haproxy": False, "startup_timeout_s": 120},
        )
        file = self.home / "shoal.yaml"
        file.write_text(json.dumps(changed(tree, changes)))
        command = [sys.executable, "-P", "-c", "from shoal.cluster.cli import main; main()", "deploy"]
        done = subprocess.run(
            [*command, "--config", str(file), "--address", self._address, *flags],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ask(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse()

    def get(self, path: str) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        return json.load(connection.getresponse())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with adopting_orphans():  # whatever becomes of it, nothing of the cluster is left
        cluster = Cluster(tmp_path_factory.mktemp("cluster"))
        yield cluster
        cluster.close()


SHORT = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "temperature": 0.8, "seed": 1, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 1500, "stream": True}
SERVED_S = 60.0


class Load:
    """Long answers, one after the other, until it is stopped. Each has to be the same."""

    def __init__(self, cluster: Cluster, expected: str) -> None:
        self.num_answers = 0
        self.failures: list[str] = []
        self._cluster, self._expected = cluster, expected
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(180)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._over.is_set():
            text = streamed(self._cluster)
            self.num_answers += 1
            if text != self._expected:
                self.failures.append(text[-500:])


def streamed(cluster: Cluster) -> str:
    """A long answer; if it has no proper end, that."""
    lines = [line.strip() for line in cluster.ask(LONG) if line.strip()]
    data = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    if not data or data[-1] != b"[DONE]" or b'"error"' in data[-2]:
        return f"no end: {lines[-2:]}"
    return "".join(choice["text"] for chunk in map(json.loads, data[:-1]) for choice in chunk["choices"])


def asked(cluster: Cluster) -> tuple[str, str | None]:
    """A short answer's text, and the variant that gave it."""
    answer = cluster.ask(SHORT)
    assert answer.status == 200, answer.read()
    return json.load(answer)["choices"][0]["text"], answer.headers["x-shoal-variant"]


def await_variant(cluster: Cluster, name: str, text: str) -> None:
    """Returns when it has answered. Whoever answers says the same."""
    deadline, variant = time.monotonic() + SERVED_S, None
    while variant != name:
        assert time.monotonic() < deadline, f"{name} is never asked"
        said, variant = asked(cluster)
        assert said == text


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_changes_under_running_answers(cluster: Cluster) -> None:
    assert "does not take our token" in cluster.deploy(code=2, environment={"RAY_AUTH_TOKEN": "another" * 5})
    said = cluster.deploy()
    assert "shoal-stable: added beside" in said
    assert f"Ready: http://127.0.0.1:{cluster.port}/v1" in said
    short, _ = asked(cluster)
    with Load(cluster, streamed(cluster)) as load:
        said = cluster.deploy(server={"replicas": 2}, variants=CANARY, rollout={"weights": {"stable": 1, "canary": 1}})
        assert "shoal: changed in place" in said
        assert "shoal-stable: changed in place (num_replicas 1 -> 2)" in said
        assert "shoal-canary: added beside" in said
        await_variant(cluster, "canary", short)
        await_variant(cluster, "stable", short)
        while len(cluster.get("/v1/cluster")["replicas"]) != 3:
            time.sleep(0.2)

        said = cluster.deploy(server={"replicas": 2}, variants=CANARY, rollout={"weights": {"canary": 1}})
        assert "shoal: changed in place (user_config.rollout.weights.stable 1.0 -> unset)" in said
        assert "shoal-stable: unchanged" in said
        while asked(cluster) != (short, "canary"):
            time.sleep(0.05)
        assert {asked(cluster) for _ in range(9)} == {(short, "canary")}

        # The canary goes, and a mistake comes: what ran before it runs on.
        said = cluster.deploy(code=1, server={"replicas": 2}, engine={"model": "/nowhere/model"})
        assert "shoal-canary: removed" in said
        assert "shoal-stable: replaced (engine.model" in said
        assert "'/nowhere/model': no such folder" in said
        await_variant(cluster, "stable", short)
        seen = load.num_answers
        while load.num_answers < seen + 2:
            time.sleep(0.1)
    assert load.failures == []
