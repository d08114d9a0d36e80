"""The declarative config: an application a part, what may change in place under `deployments`, and no secret in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.config import ShoalConfig, load_config
from shoal.cluster.parts import parts
from shoal.cluster.serve_config import check_deployable, serve_config
from shoal.runtime.errors import ConfigError

EXAMPLE = """
engine: {model: /models/llama, tensor_parallel_size: 4, max_num_seqs: 64}
router:
  secret_file: /etc/shoal/secret
  served_model_name: [llama]
server: {host: 0.0.0.0, allow_anonymous: true, redis_url: "redis://redis:6379", replicas: 2, ingresses: 2}
variants:
  - {name: canary, engine: {max_num_seqs: 128}, node_labels: {shoal.io/group: spot}}
models:
  - {name: small, engine: {model: org/small, tensor_parallel_size: 1}, replicas: 3, served_model_name: [small, tiny]}
rollout:
  weights: {stable: 95, canary: 5}
"""
IMPORT_PATH = "shoal.cluster.app:build_app"
OF_PARTS: dict[str, Any] = {"router": {"secret_file": "/etc/shoal/secret"}, "server": {}}


def load(folder: Path, text: str = EXAMPLE, **server: Any) -> ShoalConfig:
    file = folder / "shoal.yaml"
    file.write_text(text)
    return load_config({("server", name): value for name, value in server.items()}, file=file)


def apps(config: ShoalConfig) -> dict[str, dict[str, Any]]:
    return {app["name"]: app for app in serve_config(config)["applications"]}


def test_the_whole_of_an_example(tmp_path: Path) -> None:
    engine = {"model": "/models/llama", "tensor_parallel_size": 4, "max_num_seqs": 64}
    assert serve_config(load(tmp_path)) == {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "shoal",
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {
                    "router": {"secret_file": "/etc/shoal/secret", "served_model_name": ["llama"]},
                    "server": {"redis_url": "redis://redis:6379"},
                },
                "deployments": [
                    {
                        "name": "ingress",
                        "num_replicas": 2,
                        "max_surge_percent": 100,
                        "user_config": {
                            "parts": [
                                {"name": "stable", "model": "/models/llama"},
                                {"name": "canary", "model": "/models/llama", "variant": True},
                                {"name": "small", "model": "org/small", "served_model_name": ["small", "tiny"]},
                            ],
                            "rollout": {"weights": {"stable": 95.0, "canary": 5.0}},
                        },
                    }
                ],
            },
            {
                "name": "shoal-stable",
                "route_prefix": None,
                "import_path": IMPORT_PATH,
                "args": {"part": "stable", "engine": engine, **OF_PARTS},
                "deployments": [{"name": "replica", "max_surge_percent": 100, "num_replicas": 2}],
            },
            {
                "name": "shoal-canary",
                "route_prefix": None,
                "import_path": IMPORT_PATH,
                "args": {
                    "part": "canary",
                    "engine": engine | {"max_num_seqs": 128},
                    **OF_PARTS,
                    "node_labels": {"shoal.io/group": "spot"},
                },
                "deployments": [{"name": "replica", "max_surge_percent": 100, "num_replicas": 1}],
            },
            {
                "name": "shoal-small",
                "route_prefix": None,
                "import_path": IMPORT_PATH,
                "args": {
                    "part": "small",
                    "engine": engine | {"model": "org/small", "tensor_parallel_size": 1},
                    **OF_PARTS,
                },
                "deployments": [{"name": "replica", "max_surge_percent": 100, "num_replicas": 3}],
            },
        ],
    }


def test_it_is_plain_and_serve_s_own_schema_takes_it(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    text = EXAMPLE + "autoscaling: {min_replicas: 0, max_replicas: 4}\n"
    config = serve_config(load(tmp_path, text))
    assert json.loads(json.dumps(config)) == config
    ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize(
    ("change", "in_place"),
    [
        ({"replicas": 5}, ["shoal-stable"]),
        ({"ingresses": 3}, ["shoal"]),
        ({"startup_timeout_s": 9}, []),
        ({"max_surge_percent": 0}, ["shoal", "shoal-stable", "shoal-canary", "shoal-small"]),
    ],
)
def test_what_changes_in_place_leaves_the_arguments_alone(
    tmp_path: Path, change: dict[str, Any], in_place: list[str]
) -> None:
    before, after = apps(load(tmp_path)), apps(load(tmp_path, **change))
    assert [name for name in before if before[name]["args"] != after[name]["args"]] == []
    assert [name for name in before if before[name] != after[name]] == in_place


def test_the_smaller_model_is_a_model_like_others(tmp_path: Path) -> None:
    config = load(tmp_path, smaller_model="org/least", max_surge_percent=0)
    part = parts(config)[-1]
    assert (part.name, part.engine.model, part.engine.max_num_seqs, part.replicas) == ("smaller", "org/least", 64, 1)
    assert part.names == ("org/least",)
    assert serve_config(config)["applications"][-1]["args"]["engine"]["model"] == "org/least"


KEY = "k" * 32


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("secret_file: /etc/shoal/secret", f"secret: {KEY}", ["router.secret_file"]),
        ("secret_file: /etc/shoal/secret", "max_n: 3", ["router.secret_file is missing"]),
        ("  served_model_name: [llama]", f"  api_keys: [{KEY}]", ["router.api_key_file"]),
        ("redis://redis", "redis://:hidden@redis", ["server.redis_password_file"]),
        ("redis://redis:6379", "embedded", ["server.redis_url is embedded"]),
        ("weights: {stable: 95, canary: 5}", "weights: {kanary: 5}", ["'kanary'", "canary, stable"]),
        ("/etc/shoal/secret", "secret.txt", ["router.secret_file is secret.txt"]),
        ("host: 0.0.0.0", "port: 0", ["server.port is 0"]),
        ("name: small", "name: canary", ["'canary'"]),
        ("[small, tiny]", "[llama]", ["model 'small'", "'llama'"]),
    ],
)
def test_what_a_cluster_cannot_serve_is_refused(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    check_deployable(load(tmp_path))
    with pytest.raises(ConfigError) as refused:
        check_deployable(load(tmp_path, EXAMPLE.replace(old, new)))
    for word in words:
        assert word in str(refused.value)
    assert KEY not in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_variant_s_own_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"variants\[0\].engine.max_num_sequences.*max_num_seqs"):
        load(tmp_path, EXAMPLE.replace("max_num_seqs: 128", "max_num_sequences: 128"))


def test_autoscaling_changes_in_place(tmp_path: Path) -> None:
    """For Serve a policy is code, so nothing that anybody may want to change is an argument of it."""

    def of(autoscaling: str) -> dict[str, Any]:
        entry = apps(load(tmp_path, EXAMPLE + f"autoscaling: {autoscaling}\n"))["shoal-stable"]
        assert isinstance(entry, dict)
        return entry

    before, after = of("{max_replicas: 4}"), of("{min_replicas: 0, max_replicas: 5, ttft_s: 0.5, idle_s: 60}")
    assert before["args"] == after["args"]
    (mine,), (changed,) = before["deployments"], after["deployments"]
    assert mine["autoscaling_config"]["policy"] == changed["autoscaling_config"]["policy"]
    assert changed["user_config"] == {
        "autoscaling": {"min_replicas": 0, "max_replicas": 5, "ttft_s": 0.5, "idle_s": 60}
    }
    assert "initial_replicas" not in changed["autoscaling_config"]
