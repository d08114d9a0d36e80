"""The chart's values: the product's config under its own keys, and what is refused before anything starts."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from typing import Any

import pytest
import yaml

from shoal.cluster.config import ShoalConfig
from shoal.cluster.serve_config import serve_config

from .chart import CHART, MATRIX, ROOT, Values, case, merged, needs_helm, ray_service, template

SECTIONS = ("engine", "router", "server", "autoscaling", "variants", "models", "rollout")


def schema_module() -> Any:
    spec = importlib.util.spec_from_file_location("values_schema", ROOT / "helm" / "schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_says_what_the_product_does() -> None:
    text = (CHART / "values.schema.json").read_text(encoding="utf-8")
    assert text == schema_module().text(), "run: python helm/schema.py"


def test_every_section_of_the_config_is_a_key_of_the_values() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert set(SECTIONS) == set(ShoalConfig.model_fields)
    assert set(SECTIONS) <= set(values)
    said = schema_module().values_schema()["properties"]
    assert set(values) | {"global"} == set(said)


def test_versions_are_the_products() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == chart["version"] == project["version"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\nray=={merged({})['cluster']['rayVersion']}\n" in pinned


@needs_helm
def test_the_pages_example_renders() -> None:
    page = (ROOT / "docs" / "DEPLOY_HELM.md").read_text(encoding="utf-8")
    examples = re.findall("^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        done = template(yaml.safe_load(example))
        assert done.returncode == 0, done.stderr


def settled(values: Values) -> ShoalConfig:
    """What the chart makes of values: they, and beside them what it settles itself."""
    values = merged(values)
    config = {name: values[name] for name in SECTIONS if values[name] is not None}
    config["router"] = {**values["router"], "secret_file": "/etc/shoal/secrets/cluster-secret"}
    if not values["server"].get("allow_anonymous"):
        config["router"]["api_key_file"] = "/etc/shoal/secrets/api-key"
    redis = values["redis"]
    url, password = "redis://release-shoal-redis.llm.svc:6379/0", True
    if redis["mode"] == "bundled" and redis["tls"]["enabled"]:
        url = f"rediss{url.removeprefix('redis')}?ssl_ca_certs=/etc/shoal/redis/ca.crt"
    elif redis["mode"] == "external":
        url = f"{redis['external']['url']}?ssl_ca_certs=/etc/shoal/redis/ca.crt"
    elif redis["mode"] == "none":
        url, password = "none", False
    config["server"] = {
        **values["server"],
        "host": "0.0.0.0",
        "port": 8000,
        "metrics_host": "0.0.0.0",
        "metrics_port": values["monitoring"]["port"],
        "redis_url": url,
        **({"redis_password_file": "/etc/shoal/redis/password"} if password else {}),
        "node_labels": {"shoal/part": "stable"},
        "ingress_node_labels": {"shoal/part": "router"},
    }
    for name in ("variants", "models"):
        config[name] = [{**part, "node_labels": {"shoal/part": part["name"]}} for part in values[name]]
    return ShoalConfig.model_validate(config)


@needs_helm
@pytest.mark.parametrize("name", MATRIX)
def test_serves_config_is_the_products_own(name: str) -> None:
    rendered = yaml.safe_load(ray_service(case(name))["spec"]["serveConfigV2"])
    assert rendered == serve_config(settled(MATRIX[name]))


@needs_helm
@pytest.mark.parametrize("name", MATRIX)
def test_serve_and_the_builder_take_it(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from shoal.cluster.app import PartArgs
    from shoal.cluster.ingress import IngressArgs, UserConfig

    rendered = yaml.safe_load(ray_service(case(name))["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(rendered)
    ingress, *parts = rendered["applications"]
    IngressArgs.model_validate(ingress["args"])
    told = UserConfig.model_validate(ingress["deployments"][0]["user_config"])
    assert [each.name for each in told.parts] == [PartArgs.model_validate(part["args"]).part for part in parts]


def at(path: str, value: Any) -> Values:
    """`a.b` and a value, as a mapping of mappings."""
    for step in reversed(path.split(".")):
        value = {step: value}
    return dict(value)


GATEWAY = {"type": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"}
REFUSED: dict[str, tuple[Values, str]] = {
    # Typos, at every level.
    "root": (at("enigne", {}), "enigne"),
    "engine": (at("engine.modle", "m"), "/engine.*modle"),
    "router": (at("router.max_in_fligth", 3), "/router.*max_in_fligth"),
    "a tenant": (at("router.tenants", [{"name": "a", "wieght": 1}]), "/router/tenants/0.*wieght"),
    "server": (at("server.replica", 3), "/server.*replica"),
    "autoscaling": (at("autoscaling", {"max_replicas": 2, "ttft": 1}), "/autoscaling.*ttft"),
    "a variant": (at("variants", [{"name": "a", "engin": {}}]), "/variants/0.*engin"),
    "a model's engine": (at("models", [{"name": "a", "engine": {"tp": 1}}]), "/models/0/engine.*tp"),
    "rollback": (at("rollout.rollback", {"max_ttft": 1}), "/rollout/rollback.*max_ttft"),
    "cluster": (at("cluster.repliac", {}), "/cluster.*repliac"),
    "pods of a part": (at("cluster.parts", {"stable": {"gpus": 1}}), "/cluster/parts/stable.*gpus"),
    "redis": (at("redis.external.uri", "x"), "/redis/external.*uri"),
    "weights": (at("weights.pvc.claim", "x"), "/weights/pvc.*claim"),
    "monitoring": (at("monitoring.alert", True), "/monitoring.*alert"),
    # What is not its kind, or out of its limits.
    "a number as text": (at("server.replicas", "three"), "/server/replicas"),
    "a negative number": (at("engine.tensor_parallel_size", 0), "/engine/tensor_parallel_size"),
    "no such source": (at("weights.source", "s3"), "/weights/source"),
    "no such Redis": (at("redis.mode", "embedded"), "/redis/mode"),
    "latest": (at("image.tag", "latest"), "/image/tag"),
    "a part's name": (at("variants", [{"name": "A_b"}]), "/variants/0/name"),
    # What the chart settles itself.
    "a key": (at("router.api_keys", ["sk-1"]), "/router.*api_keys"),
    "the secret": (at("router.secret", "s" * 32), "/router.*secret"),
    "a port": (at("server.port", 80), "/server.*port"),
    "a URL of Redis": (at("server.redis_url", "redis://h"), "/server.*redis_url"),
    "a secret's name": (at("secrets.existingSecret", "My_Secret"), "/secrets/existingSecret.*does not match"),
    "a URL for a host": (at("ingress.host", "https://llm.example"), "/ingress/host"),
    "a label": (at("cluster.replica.nodeSelector", {"a b": "c"}), "/cluster/replica/nodeSelector"),
    "a port of HAProxy's": (at("monitoring.port", 9101), "/monitoring/port"),
    "a port that workers take": (at("monitoring.port", 12000), "/monitoring/port"),
    "a runbook's anchor": (at("monitoring.runbookUrl", "https://h/o.md#a"), "/monitoring/runbookUrl"),
    "too many": (at("server.replicas", 10**9), "/server/replicas.*10,000"),
    # A null takes a default away.
    "no Redis at all": (at("redis", None), "redis has no value: leave the key out"),
    "no server": (at("server", None), "server has no value"),
    "no GPUs of a machine": (at("cluster.replica.gpusPerNode", None), "cluster.replica.gpusPerNode has no value"),
    # What only the whole can tell.
    "a name that is none to YAML": (at("fullnameOverride", "null"), 'the name "null" is no text to YAML'),
    "served twice": (at("models", [{"name": "a"}]), 'models, a: it would be served as "Qwen/Qwen3-0.6B", as engine is'),
    "served twice by name": (
        at("models", [{"name": n, "engine": {"model": f"o/{n}"}, "served_model_name": ["x"]} for n in ("a", "b")]),
        'models, b: it would be served as "x", as models, a is',
    ),
    "a ladder to nowhere": (at("router.ladder", [{"load": 1, "model": "z"}]), 'no other model "z" to fall to'),
    "a rung that gives nothing": (at("router.ladder", [{"load": 1}]), "rung at load 1 gives nothing up"),
    "a ladder downwards": (
        at("router.ladder", [{"load": 2, "shed": True}, {"load": 1.5, "shed": True}]),
        "rung at load 1.5 stands no higher than the one before, at 2",
    ),
    "two tenants": (at("router.tenants", [{"name": "a"}, {"name": "a"}]), 'two tenants have the name "a"'),
    "no weight": (at("rollout.weights", {"stable": 0}), "rollout.weights: all are 0"),
    "an odd block": (at("engine.block_size", 48), "engine: block_size is 48, and must be a power of two"),
    "pods of the router's": (at("cluster.parts", {"router": {}}), "cluster.parts.router: there is no such part"),
    "a variable of the chart's": (at("cluster.env", [{"name": "HOME", "value": "/"}]), "cluster.env has HOME"),
    "a variable twice": (at("cluster.env", 2 * [{"name": "A", "value": "1"}]), "cluster.env has A, .* twice"),
    "weights where pods write": (at("weights.path", "/tmp"), "weights.path is /tmp, and /tmp is the pods' own"),
    "weights where secrets are": (at("weights.path", "/etc/shoal"), "weights.path is /etc/shoal"),
    "a long name": (at("fullnameOverride", "n" * 48), "48 characters.*at most 47.*fullnameOverride"),
    "no name": (at("fullnameOverride", "9lives"), "must begin with a letter.*fullnameOverride"),
    "a wide grid": (at("engine.tensor_parallel_size", 16), "16 is more than the 8 GPUs of a machine.*gpusPerNode"),
    "a grid that does not fit": (
        {"engine": {"tensor_parallel_size": 4, "pipeline_parallel_size": 3}},
        "3 stages of 4 GPUs do not fill machines of 8 GPUs evenly.*pipeline_parallel_size",
    ),
    "a variant's grid": (
        at("variants", [{"name": "wide", "engine": {"tensor_parallel_size": 9}}]),
        "variants, wide: tensor_parallel_size 9 is more",
    ),
    "layers of other stages": (
        at("engine.pp_layers", [8, 8]),
        "pp_layers names 2 stages and pipeline_parallel_size is 1",
    ),
    "min over max": (
        at("autoscaling", {"min_replicas": 3, "max_replicas": 2}),
        "min_replicas 3 is more than max_replicas 2",
    ),
    "two of a name": ({"variants": [{"name": "a"}], "models": [{"name": "a"}]}, 'models, a: the name "a" is taken'),
    "stable again": (at("models", [{"name": "stable"}]), 'the name "stable" is taken'),
    "no such part": (
        at("cluster.parts", {"canary": {}}),
        "cluster.parts.canary: there is no such part; there are stable",
    ),
    "no such variant": (at("rollout.weights", {"stabel": 1}), "rollout.weights.stabel: there is no such variant"),
    "a shadow of none": (at("rollout.shadow", {"x": 0.5}), "rollout.shadow.x: there is no such variant"),
    "no claim": (at("weights.source", "pvc"), "set weights.pvc.claimName"),
    "no bucket": (at("weights.source", "objectStore"), "set weights.objectStore.url"),
    "not a bucket": (
        at("weights", {"source": "objectStore", "objectStore": {"url": "https://host/x"}}),
        "https://host/x.*s3://, gs:// or azblob://",
    ),
    "a hub id in a bucket": (
        at("weights", {"source": "objectStore", "objectStore": {"url": "s3://b/p"}}),
        '"Qwen/Qwen3-0.6B" is not below /models',
    ),
    "a path in the hub": (at("engine.model", "/models/m"), '"/models/m" is no hub id.*weights.source'),
    "no URL": (at("redis.mode", "external"), "set redis.external.url"),
    "a login in a URL": (
        at("redis", {"mode": "external", "external": {"url": "redis://u:hunter2@h"}}),
        "redis.external.url has a login in it.*redis.external.existingSecret",
    ),
    "a password in a URL": (
        at("redis", {"mode": "external", "external": {"url": "redis://h?password=hunter2"}}),
        "redis.external.url has a password in it",
    ),
    "a CA without TLS": (
        at("redis", {"mode": "external", "external": {"url": "redis://h", "caSecret": "ca"}}),
        "redis.external.url is not rediss://",
    ),
    "the head's state in a cluster of Redis": (
        at("redis", {"mode": "external", "external": {"url": "redis+cluster://h"}}),
        "cluster.gcsFaultTolerance needs one Redis server",
    ),
    "fault tolerance by variable": (
        at("cluster.env", [{"name": "RAY_REDIS_ADDRESS", "value": "h"}]),
        "RAY_REDIS_ADDRESS",
    ),
    "fault tolerance by annotation": (at("cluster.annotations", {"ray.io/ft-enabled": "true"}), "ray.io/ft-enabled"),
    "no gateway": (at("cluster.upgrade.type", GATEWAY["type"]), "set cluster.upgrade.gatewayClassName"),
    "large steps": (
        at("cluster.upgrade", {**GATEWAY, "stepSizePercent": 50, "maxSurgePercent": 20}),
        "stepSizePercent 50 is more than maxSurgePercent 20",
    ),
    "two ways in": (
        {"cluster": {"upgrade": GATEWAY}, "ingress": {"enabled": True}},
        "turn off ingress.enabled and httpRoute.enabled",
    ),
    "a route to nowhere": (at("httpRoute.enabled", True), "name a Gateway in httpRoute.parentRefs"),
}


@needs_helm
@pytest.mark.parametrize("what", REFUSED)
def test_bad_values_are_refused(what: str) -> None:
    values, sentence = REFUSED[what]
    done = template(values)
    assert done.returncode != 0
    said = " ".join(done.stderr.split()).replace('\\"', '"')
    assert re.search(sentence, said), said
    assert "hunter2" not in said
