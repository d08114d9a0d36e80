"""`shoal ray-up`: the files that come for each cloud, and what is refused before a machine is started."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from shoal.cluster.config import load_config
from shoal.cluster.ray_env import cluster_environment, ray_environment, write_launcher
from shoal.cluster.ray_up import CLOUDS, NODE, SHIPPED, hub_ids, init, main
from shoal.cluster.ray_up_check import check
from shoal.runtime.errors import ConfigError

MODEL = "org/model"
SECRETS = ("auth-token", "secret", "redis-password", "api-keys")
START = "ray start"


def made(tmp_path: Path, cloud: str) -> Path:
    """A folder that an operator has made and filled in; its cluster file."""
    init(tmp_path / "serving", cloud, MODEL)
    file = tmp_path / "serving" / f"{cloud}.yaml"
    file.write_text(re.sub("<(.*?)>", r"\1", file.read_text()))
    return file


def shipped(cloud: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((SHIPPED / f"{cloud}.yaml").read_text())
    return tree


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) >= 1, old
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_folder_that_is_filled_in_is_accepted_by_ray_and_by_us(tmp_path: Path, cloud: str) -> None:
    file = made(tmp_path, cloud)
    validate_config(prepare_config(yaml.safe_load(file.read_text())))
    check(file)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_is_left_to_fill_in_is_named(tmp_path: Path, cloud: str) -> None:
    init(tmp_path / "serving", cloud, MODEL)
    with pytest.raises(ConfigError) as refused:
        check(tmp_path / "serving" / f"{cloud}.yaml")
    places = re.findall(rf"{cloud}.yaml:(\d+): provider\.\S+ is still <", str(refused.value))
    lines = (SHIPPED / f"{cloud}.yaml").read_text().splitlines()
    assert places
    assert all("<" in lines[int(place) - 1] for place in places)


def test_all_clouds_do_the_same_on_their_machines() -> None:
    trees = [shipped(cloud) for cloud in CLOUDS]
    for key in ("file_mounts", "setup_commands", "worker_setup_commands"):
        assert all(tree[key] == trees[0][key] for tree in trees), key
    for tree in trees:
        head, worker = tree["head_start_ray_commands"], tree["worker_start_ray_commands"]
        for command in (*head, *worker):
            if START in command:
                assert ". ~/.shoal/env && " in command.partition(START)[0]
        assert [START in command for command in head] == [False, False, True, False]
        assert "--dashboard-host=127.0.0.1" in head[2]
        assert "~/shoal/node.sh" in tree["setup_commands"][0]


@pytest.mark.parametrize("cloud", CLOUDS[:3])
def test_spot_goes_before_the_same_machine_on_demand(cloud: str) -> None:
    types = shipped(cloud)["available_node_types"]
    spot = {name for name, entry in types.items() if entry["labels"].get("market") == "spot"}
    assert len(spot) >= 2
    for name in spot:
        other = types[name.removesuffix("-spot")]
        assert other["resources"] == types[name]["resources"]
        assert types[name]["priority"] > other.get("priority", 0)
        assert re.search("spot", str(types[name]["node_config"]), re.IGNORECASE)
        assert not re.search("spot", str(other["node_config"]), re.IGNORECASE)
    assert types["head"]["labels"] == {"shoal/role": "router"}


class Quiet:
    """An event log that nobody reads."""

    def log_cluster_scheduling_update(self, **_: Any) -> None: ...


@pytest.mark.parametrize("cloud", CLOUDS[:3])
def test_ray_s_own_scheduler_takes_spot_and_without_any_the_same_on_demand(cloud: str) -> None:
    config = AutoscalingConfig(shipped(cloud), skip_content_hash=True)
    types = config.get_node_type_configs()
    for gpus in (4, 8):
        (spot,) = (name for name in types if name.endswith("-spot") and types[name].resources["GPU"] == gpus)
        for unavailable, expected in ({}, spot), ({spot: 0.0}, spot.removesuffix("-spot")):
            wanted = SchedulingRequest(
                node_type_configs=types,
                max_num_nodes=config.get_max_num_nodes(),
                idle_timeout_s=config.get_idle_timeout_s(),
                disable_launch_config_check=True,
                resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": gpus})]),
                recoverable_resource_availabilities=unavailable,
            )
            launched = ResourceDemandScheduler(Quiet()).schedule(wanted).to_launch
            assert [(launch.instance_type, launch.count) for launch in launched] == [(expected, 1)]


def test_secrets_are_new_closed_and_nowhere_else(tmp_path: Path) -> None:
    for name in ("one", "two"):
        init(tmp_path / name, "aws", MODEL)
    node = tmp_path / "one" / NODE
    values = [(node / name).read_text().strip() for name in SECRETS]
    values += [(tmp_path / "two" / NODE / name).read_text().strip() for name in SECRETS]
    assert len(set(values)) == 8
    assert min(map(len, values)) >= 32
    assert all((node / name).stat().st_mode & 0o077 == 0 for name in SECRETS)
    for file in (tmp_path / "one" / "aws.yaml", node / "shoal.yaml", node / "node.sh"):
        assert not any(value in file.read_text() for value in values)


MISTAKES = {
    "root key": ("max_workers: 8", "max_worker: 8", "aws.yaml:6: unknown key max_worker; did you mean max_workers?"),
    "node type key": (
        "    priority: 10",
        "    priorty: 10",
        "unknown key available_node_types.l4x4-spot.priorty; did you mean available_node_types.l4x4-spot.priority?",
    ),
    "auth key": ("ssh_user: ubuntu", "ssh_usr: ubuntu", "unknown key auth.ssh_usr; did you mean auth.ssh_user?"),
    "provider key": ("availability_zone:", "availibility_zone:", "did you mean provider.availability_zone?"),
    "given twice": ("max_workers: 8", "max_workers: 8\nmax_workers: 9", "aws.yaml:7: max_workers is given twice"),
    "Ray's own": ("max_workers: 8", "max_workers: eight", "aws.yaml:6: max_workers: 'eight' is not of type 'integer'"),
    "no such head": (
        "head_node_type: head",
        "head_node_type: heads",
        "aws.yaml:27: head_node_type heads is none of available_node_types: head, l4x4-spot",
    ),
    "a name of no machine": (
        "cluster_name: shoal",
        "cluster_name: My_Cluster",
        "aws.yaml:5: cluster_name My_Cluster names machines",
    ),
    "a long name": ("cluster_name: shoal", f"cluster_name: {'s' * 36}", "at most 35 in all"),
    "no name": ("cluster_name: shoal", "", "cluster_name is missing"),
    "no most": ("max_workers: 8 #", "# max_workers: 8 #", "max_workers is missing"),
    "no user": ("  ssh_user: ubuntu", "  ssh_private_key: ~/key", "auth.ssh_user is missing"),
    "Ray's own start": (
        "worker_start_ray_commands:",
        "initialization_commands:",
        "worker_start_ray_commands is missing",
    ),
    "no kind of cloud": ("  type: aws", "", "provider.type is missing"),
    "an empty list": ("head_setup_commands:", "head_setup_commands:\ninitialization_commands:", "None is not of type"),
    "routers nowhere": (
        "labels: {shoal/role: router}",
        "labels: {shoal/role: head}",
        "routers want the labels {'shoal/role': 'router'} (server.ingress_node_labels), which no type of machine has",
    ),
    "shell": ("node.sh install", 'node.sh "install', "bash cannot read this command"),
    "without settings": (". ~/.shoal/env && ray start --address", "ray start --address", "settings that Serve needs"),
    "open dashboard": ("dashboard-host=127.0.0.1", "dashboard-host=0.0.0.0", "governs the cluster"),
    "no such file": ("node/auth-token", "node/token", "node/token is not there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_cluster_file_is_named_with_its_place(tmp_path: Path, mistake: str) -> None:
    old, new, message = MISTAKES[mistake]
    file = made(tmp_path, "aws")
    change(file, old, new)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(file)


DEPLOYMENTS = {
    "unknown key": ("  host:", "  hots:", "unknown key server.hots; did you mean server.host?"),
    "loopback": ("host: 0.0.0.0", "host: 127.0.0.1", "does not reach a router on another machine"),
    "secret within": ("server:", f"router: {{secret: {'s' * 32}}}\nserver:", "name a file with it, router.secret_file"),
    "too wide": (f"model: {MODEL}", f"model: {MODEL}\n  tensor_parallel_size: 16", "needs 16 GPUs on one machine"),
    "no such label": (
        "  host:",
        "  node_labels: {gpu: b200}\n  host:",
        "stable needs 1 GPUs on one machine with the labels {'gpu': 'b200'}",
    ),
    "too many": ("  host:", "  replicas: 99\n  host:", "need up to 99 GPUs, and max_workers lets there be 48"),
}


@pytest.mark.parametrize("mistake", DEPLOYMENTS)
def test_a_deployment_that_these_machines_cannot_hold_is_refused(tmp_path: Path, mistake: str) -> None:
    old, new, message = DEPLOYMENTS[mistake]
    file = made(tmp_path, "aws")
    change(file.parent / NODE / "shoal.yaml", old, new)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(file)


def test_secrets_that_are_missing_or_open_are_refused(tmp_path: Path) -> None:
    file = made(tmp_path, "gcp")
    (file.parent / NODE / "secret").chmod(0o644)
    (file.parent / NODE / "redis-password").unlink()
    with pytest.raises(ConfigError) as refused:
        check(file)
    assert "others can read this secret: chmod 600 it" in str(refused.value)
    assert "redis-password is missing" in str(refused.value)


@pytest.mark.parametrize("section", ["provider", "docker", "file_mounts", "available_node_types", "setup_commands"])
@pytest.mark.parametrize("value", [None, "text", 5])
def test_what_is_no_mapping_or_list_is_named_with_its_line(tmp_path: Path, section: str, value: object) -> None:
    """Ray itself ends in a traceback."""
    file = made(tmp_path, "gcp")
    tree = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**tree, section: value}, sort_keys=False))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(f"{section}:"))
    with pytest.raises(ConfigError, match=rf"gcp\.yaml:{line}: {section}: .* is not of type"):
        check(file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("secret", "short", "secret has 5 characters and needs at least 32"),
        ("auth-token", "\n", "auth-token has 0 characters and needs at least 1"),
        ("api-keys", "\n", "no key in it"),
        ("api-keys", "sk-one two\n", "line 1: an API key"),
    ],
)
def test_files_that_cannot_be_what_they_are_named_after(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = made(tmp_path, "aws")
    (file.parent / NODE / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check(file)


@pytest.mark.parametrize("address", ["10.0.0.10", "10.0.0.11"])
def test_a_machine_is_one_and_no_other(tmp_path: Path, address: str) -> None:
    file = made(tmp_path, "on-premises")
    change(file, "    - 10.0.0.11\n", f"    - 10.0.0.11\n    - {address}\n")
    with pytest.raises(ConfigError, match=rf"on-premises\.yaml:\d+: {address} is there twice"):
        check(file)


def test_nobody_comes_in_without_a_key_be_it_a_tenant_s(tmp_path: Path) -> None:
    file = made(tmp_path, "gcp")
    (file.parent / NODE / "api-keys").unlink()
    with pytest.raises(ConfigError, match="without an API key"):
        check(file)
    tenant = f"{{name: research, keys: ['sha256:{'0' * 64}']}}"
    change(file.parent / NODE / "shoal.yaml", "server:", f"router: {{tenants: [{tenant}]}}\nserver:")
    check(file)


def test_init_refuses_what_it_would_spoil_or_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        init(tmp_path / "full", "aws", MODEL)
    with pytest.raises(ConfigError, match="none of the clouds"):
        init(tmp_path / "new", "aws2", MODEL)
    with pytest.raises(ConfigError, match="--wheel"):
        init(tmp_path / "new", "aws", MODEL, wheel=tmp_path / "full" / "thesis.txt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("model", ["a: b # c", "2026-11-22", "true", "/models/Ünder score"])
def test_a_model_s_name_is_text_whatever_yaml_would_make_of_it(tmp_path: Path, model: str) -> None:
    init(tmp_path / "new", "aws", model)
    assert load_config({}, file=tmp_path / "new" / NODE / "shoal.yaml").engine.model == model


def test_models_that_nodes_fetch_are_the_hub_s_alone(tmp_path: Path) -> None:
    file = tmp_path / "shoal.yaml"
    file.write_text(
        f"engine: {{model: org/main, speculative_model: ngram}}\n"
        f"models: [{{name: a, engine: {{model: {tmp_path}}}}}, {{name: b, engine: {{model: org/other}}}}]\n"
        f"variants: [{{name: c, engine: {{kv_cache_dtype: int8}}}}]\n"
    )
    assert hub_ids(load_config({}, file=file)) == ["org/main", "org/other"]


def test_the_head_knows_which_machines_with_addresses_are_its_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ray_bootstrap_config.yaml"
    main("workers", file)
    file.write_text(
        '{"auth": {"ssh_user": "ops"}, "provider": {"type": "local", "worker_ips": ["10.0.0.2", "10.0.0.3"]}}'
    )
    main("workers", file)
    assert capsys.readouterr().out.split() == ["ops@10.0.0.2", "ops@10.0.0.3"]


class Node:
    """A home of its own, where node.sh runs as it does on a machine whose image brings Shoal."""

    def __init__(self, home: Path) -> None:
        self.home = home
        init(home / "serving", "on-premises", MODEL)
        (home / "serving" / NODE).rename(home / "shoal")
        (home / ".bashrc").touch()

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = {"HOME": str(self.home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["bash", str(self.home / "shoal" / "node.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_node_s_settings_are_the_package_s_in_every_shell(tmp_path: Path) -> None:
    node = Node(tmp_path)
    for _ in range(2):
        done = node.run("install")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / ".bashrc").read_text() == ". ~/.shoal/env\n"
    command = ["bash", "-c", ". ~/.bashrc && env -0"]
    shell = subprocess.run(command, env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    found = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)
    run_dir = tmp_path / ".shoal" / "run"
    wanted = cluster_environment(run_dir, run_dir / "haproxy")
    assert wanted.items() <= found.items()
    assert found["PATH"].startswith(str(Path(sys.executable).parent))
    assert run_dir.stat().st_mode & 0o077 == 0
    launcher = Path(wanted["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert os.access(launcher, os.X_OK)
    assert str(launcher) not in launcher.read_text()  # though the second time it was HAProxy's place already


def test_a_node_says_what_it_can_do_to_who_asks_for_something_else(tmp_path: Path) -> None:
    done = Node(tmp_path).run("instal")
    assert done.returncode == 2
    assert "node.sh install" in done.stderr


def test_a_cluster_is_not_pinned_to_loopback_and_serves_as_one_machine_does(tmp_path: Path) -> None:
    alone, node = ray_environment(tmp_path, haproxy=True), cluster_environment(tmp_path, tmp_path / "haproxy")
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in alone
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in node
    assert node["RAY_AUTH_MODE"] == "token"
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED", "PYTHONSAFEPATH"):
        assert alone[name] == node[name] == "1"
    assert cluster_environment(tmp_path, None)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@pytest.mark.parametrize("endpoint", ["*:8000", "10.0.0.2:8000", "127.0.0.1:8000"])
def test_haproxy_s_own_pages_are_held_to_loopback_and_the_endpoint_is_where_it_was_told(
    tmp_path: Path, endpoint: str
) -> None:
    config = tmp_path / "haproxy.cfg"
    own = "frontend prometheus\n    bind {}:9101\n    mode http\n"
    stats = "listen stats\n  bind {}:8404\n  stats enable\n"
    front = f"frontend http_frontend\n    bind {endpoint}\n"
    config.write_text(own.format("") + front + stats.format("*"))
    launcher = write_launcher(tmp_path)
    subprocess.run([launcher, "-c", "-f", config], capture_output=True, check=False)  # looks through it, serves nothing
    assert config.read_text() == own.format("127.0.0.1") + front + stats.format("127.0.0.1")


def test_the_files_are_in_the_wheel_under_the_name_that_nodes_look_for() -> None:
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert "ray-up/*" in project["tool"]["setuptools"]["package-data"]["shoal.cluster"]
    name = f"{project['project']['name']}-{project['project']['version']}-py3-none-any.whl"
    (pattern,) = re.findall(r"-name '(\S+?\.whl)'", (SHIPPED / "node.sh").read_text())
    assert Path(name).match(pattern)
