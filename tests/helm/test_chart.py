"""What the chart renders: accepted by Kubernetes, by KubeRay and by its controller, and as safe as it says."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shoal.cluster.ray_env import cluster_environment

from .chart import (
    CHART,
    HELM,
    MATRIX,
    ROOT,
    case,
    group,
    helm,
    manifests,
    needs_helm,
    of_kind,
    pod_templates,
    ray_service,
    template,
)
from .crds import ray_service_schema, repeated, validators
from .kuberay import complaints

pytestmark = needs_helm
KUBERNETES = "1.37"
OTHERS = {
    "RayService",
    "HTTPRoute",
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
}  # kinds that Kubernetes knows not
CASES = pytest.mark.parametrize("name", MATRIX)


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, spec) of all pods that one case leads to."""
    found = case(name)
    for part, made in pod_templates(ray_service(found)).items():
        yield part, made["spec"]
    yield from (("redis", each["spec"]["template"]["spec"]) for each in of_kind(found, "StatefulSet"))
    yield from (("test", each["spec"]) for each in of_kind(found, "Pod"))


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def environment(container: dict[str, Any]) -> dict[str, str | None]:
    return {variable["name"]: variable.get("value") for variable in container.get("env", ())}


def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@CASES
def test_kubernetes_takes_every_manifest(name: str) -> None:
    for manifest in case(name):
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@CASES
def test_names_are_told_apart(name: str) -> None:
    named = [(each["kind"], each["metadata"]["name"]) for each in case(name)]
    assert len(set(named)) == len(named)


@pytest.mark.skipif("SHOAL_KUBERAY_CRDS" not in os.environ, reason="SHOAL_KUBERAY_CRDS names no folder with the CRDs")
def test_the_custom_resource_definitions_take_every_ray_service() -> None:
    folder = Path(os.environ["SHOAL_KUBERAY_CRDS"])
    known, schema = validators(folder)["ray.io/v1", "RayService"], ray_service_schema(folder)
    for name in MATRIX:
        errors = [
            f"{name}: {'/'.join(map(str, e.path))}: {e.message}" for e in known.iter_errors(ray_service(case(name)))
        ]
        assert not errors
        assert not list(repeated(schema, ray_service(case(name))))
    typo = copy.deepcopy(ray_service(case("defaults")))
    typo["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert list(known.iter_errors(typo))
    twice = copy.deepcopy(ray_service(case("defaults")))
    variables = twice["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    variables.append(variables[0])
    assert list(repeated(schema, twice))


@CASES
def test_kuberays_controller_takes_every_ray_service(name: str) -> None:
    assert complaints(ray_service(case(name))) == []


def test_kuberays_rules_find_what_breaks_them() -> None:
    service = copy.deepcopy(ray_service(case("incremental")))
    cluster = service["spec"]["rayClusterConfig"]
    service["metadata"]["name"] = "n" * 48
    service["metadata"]["annotations"] = {"ray.io/ft-enabled": "true"}
    cluster["upgradeStrategy"] = {"type": "Recreate"}
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"] = []
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": "RAY_REDIS_ADDRESS"})
    cluster["headGroupSpec"] |= {"resources": {"CPU": "1"}, "headService": {"metadata": {"name": "mine"}}}
    cluster["workerGroupSpecs"][1]["minReplicas"] = 9
    cluster["workerGroupSpecs"][1]["rayStartParams"]["labels"] = "a=b"
    cluster["workerGroupSpecs"][1]["template"]["spec"]["restartPolicy"] = "Always"
    service["spec"]["upgradeStrategy"]["clusterUpgradeOptions"]["stepSizePercent"] = 101
    del cluster["enableInTreeAutoscaling"], cluster["authOptions"]
    assert len(complaints(service)) == 14


def test_a_grid_is_cut_to_machines() -> None:
    two_hosts = group(ray_service(case("tp8-pp2-two-hosts")), "stable")
    limits = two_hosts["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (two_hosts["numOfHosts"], limits["nvidia.com/gpu"]) == (2, 8)
    assert (two_hosts["minReplicas"], two_hosts["maxReplicas"]) == (0, 3 + 1)  # one for a change that rolls through
    service = ray_service(case("models-and-variants"))
    found = {}
    for name in ("stable", "canary", "next", "small"):
        made = group(service, name)
        gpus = made["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        found[name] = (gpus, made["numOfHosts"], made["minReplicas"], made["maxReplicas"])
    assert found == {"stable": (2, 1, 3, 4), "canary": (2, 1, 1, 2), "next": (8, 1, 2, 3), "small": (1, 1, 2, 6)}
    assert group(service, "small")["template"]["spec"]["nodeSelector"] == {"gpu": "l4"}
    # KubeRay adds a group behind the others to the running cluster; elsewhere it would make a new one.
    groups = [made["groupName"] for made in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    assert groups == ["router", "stable", "small", "canary", "next"]


def test_without_gpus_none_are_asked_for() -> None:
    for part, spec in pods("cpu"):
        limits = spec["containers"][0]["resources"]["limits"]
        assert set(limits) == {"memory"}, part


@CASES
def test_groups_have_the_labels_that_the_applications_ask_for(name: str) -> None:
    service = ray_service(case(name))
    offered = [made["labels"] for made in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    asked = [app["args"]["node_labels"] for app in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]]
    assert sorted(map(json.dumps, offered)) == sorted(map(json.dumps, asked))
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@CASES
def test_every_node_has_the_products_settings(name: str) -> None:
    haproxy = name != "cpu"
    wanted = cluster_environment(Path("/tmp/shoal"), Path("/opt/shoal/haproxy") if haproxy else None)
    for part, made in pod_templates(ray_service(case(name))).items():
        assert wanted.items() <= environment(made["spec"]["containers"][0]).items(), part


@CASES
def test_pods_may_do_little(name: str) -> None:
    for part, spec in pods(name):
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True, part
        assert pod["runAsUser"] > 0, part
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, part
        # The head's autoscaler asks the API server for pods.
        assert (spec.get("automountServiceAccountToken") is False) == (part != "head"), part
        for container in containers(spec):
            allowed = container["securityContext"]
            assert allowed["readOnlyRootFilesystem"] is True, part
            assert allowed["allowPrivilegeEscalation"] is False, part
            assert allowed["capabilities"] == {"drop": ["ALL"]}, part
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, part
            assert "memory" in container["resources"]["limits"], part
            assert not container["image"].endswith(":latest"), part
            assert ":" in container["image"], part


@CASES
def test_mounts_have_their_volumes(name: str) -> None:
    for part, spec in pods(name):
        volumes = {volume["name"] for volume in spec.get("volumes", ())} | {"data"}  # the claim's
        mounts = {mount["name"] for container in containers(spec) for mount in container.get("volumeMounts", ())}
        assert mounts <= volumes, part
        if part not in ("test", "redis"):
            written = {
                mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"] if not mount.get("readOnly")
            }
            assert {"/tmp", "/home/shoal"} <= written, part


@CASES
def test_secrets_are_in_secrets_alone(name: str) -> None:
    found = case(name)
    drawn = {
        base64.b64decode(value).decode()
        for secret in of_kind(found, "Secret")
        for key, value in secret["data"].items()
        if not key.endswith(".crt")
    }
    assert bool(drawn) == (name != "existing-secrets")
    shown = json.dumps([each for each in found if each["kind"] != "Secret"])
    assert not [value for value in drawn if json.dumps(value)[1:-1] in shown]


def test_secrets_are_drawn_anew_for_each_installation() -> None:
    first, second = (
        {k: v for s in of_kind(m, "Secret") for k, v in s["data"].items()} for m in map(manifests, ({}, {}))
    )
    assert set(first) == {"auth_token", "cluster-secret", "api-key", "redis-password"}
    assert not set(first.values()) & set(second.values())
    assert all(len(base64.b64decode(value)) >= 48 for value in first.values())


def test_a_secret_of_ones_own_takes_the_place_of_all() -> None:
    found = case("existing-secrets")
    assert not of_kind(found, "Secret")
    text = yaml.safe_dump(list(found))
    assert "name: mine" in text
    cluster = ray_service(found)["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "mine"}


@pytest.mark.parametrize("name", ["defaults", "external-redis-tls", "redis-tls", "no-redis"])
def test_the_heads_state_lies_where_answers_do(name: str) -> None:
    found = case(name)
    service = ray_service(found)
    ingress = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["server"]
    tolerance = service["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions")
    head = environment(pod_templates(service)["head"]["spec"]["containers"][0])
    if name == "no-redis":
        assert tolerance is None
        assert ingress["redis_url"] == "none"
        assert not of_kind(found, "StatefulSet")
        return
    assert tolerance["backend"] == "redis"
    server = ingress["redis_url"].partition("://")[2].partition("/")[0]
    assert tolerance["redisAddress"].partition("://")[2] == server  # Ray knows no databases
    assert tolerance["redisPassword"]["valueFrom"]["secretKeyRef"]["key"] == "redis-password"
    assert ingress["redis_password_file"] == "/etc/shoal/redis/password"
    tls = name != "defaults"
    assert ingress["redis_url"].startswith("rediss://" if tls else "redis://")
    assert head.get("RAY_REDIS_CA_CERT") == ("/etc/shoal/redis/ca.crt" if tls else None)
    assert ("ssl_ca_certs=/etc/shoal/redis/ca.crt" in ingress["redis_url"]) == tls


def test_requests_reach_ingresses_alone() -> None:
    service = ray_service(case("defaults"))["spec"]
    assert service["excludeHeadPodFromServeSvc"] is True
    (port,) = service["serveService"]["spec"]["ports"]
    ports = {
        name: {p["name"] for p in made["spec"]["containers"][0].get("ports", ())}
        for name, made in pod_templates({"spec": service}).items()
    }
    assert [name for name, names in ports.items() if port["targetPort"] in names and name != "head"] == ["router"]
    probe = group({"spec": service}, "router")["template"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/ready", "port": 8000}
    # KubeRay's own probe would want Serve's proxy on a pod that has none.
    assert group({"spec": service}, "stable")["template"]["spec"]["containers"][0]["readinessProbe"]["httpGet"] == {
        "path": "/api/healthz",
        "port": 52365,
    }


def test_a_pod_ends_after_its_answers() -> None:
    service = ray_service(manifests({"server": {"drain_timeout_s": 20, "ingress_drain_timeout_s": 99.5}}))
    for name, made in pod_templates(service).items():
        spec = made["spec"]
        assert spec["terminationGracePeriodSeconds"] == (30 if name == "head" else 130)
        if name != "head":
            hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert hook == ["shoal", "drain-node", "--in-s", "100", "--wait"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] == 100
    spot = manifests({"cluster": {"parts": {"stable": {"drainSeconds": 25}}}})
    assert group(ray_service(spot), "stable")["template"]["spec"]["terminationGracePeriodSeconds"] == 55


def test_the_way_in() -> None:
    (ingress,) = of_kind(case("ingress"), "Ingress")
    backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    made = ray_service(case("ingress"))["spec"]["serveService"]
    assert backend == {"name": made["metadata"]["name"], "port": {"name": made["spec"]["ports"][0]["name"]}}
    assert (made["spec"]["type"], made["spec"]["ports"][0]["port"]) == ("LoadBalancer", 8080)
    assert ingress["spec"]["tls"] == [{"secretName": "llm-tls", "hosts": ["llm.example"]}]
    (route,) = of_kind(case("httproute"), "HTTPRoute")
    assert route["spec"]["rules"][0]["backendRefs"] == [{"name": "release-shoal", "port": 80}]
    assert route["spec"]["hostnames"] == ["llm.example"]
    for name in ("defaults", "incremental"):
        assert not of_kind(case(name), "Ingress")
        assert not of_kind(case(name), "HTTPRoute")


def test_an_incremental_upgrade_where_there_is_a_gateway_api() -> None:
    strategy = ray_service(case("incremental"))["spec"]["upgradeStrategy"]
    assert strategy["type"] == "NewClusterWithIncrementalUpgrade"
    assert strategy["clusterUpgradeOptions"]["gatewayClassName"] == "istio"
    assert "release-shoal-routers" in [each["metadata"]["name"] for each in of_kind(case("incremental"), "Service")]
    without = helm("template", "release", str(CHART), "--set", "cluster.upgrade.gatewayClassName=istio")
    assert ray_service(list(filter(None, yaml.safe_load_all(without.stdout))))["spec"]["upgradeStrategy"] == {
        "type": "NewCluster"
    }


def test_monitoring() -> None:
    found = case("monitoring")
    (monitor,) = of_kind(found, "ServiceMonitor")
    (service,) = [s for s in of_kind(found, "Service") if s["metadata"]["name"].endswith("-metrics")]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    (pod_monitor,) = of_kind(found, "PodMonitor")
    assert pod_monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    (rule,) = of_kind(found, "PrometheusRule")
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text(encoding="utf-8"))
    assert rule["spec"] == alerts
    dashboards = [m for m in of_kind(found, "ConfigMap") if m["metadata"]["name"].endswith("-dashboard")]
    text = (CHART / "files" / "dashboard.json").read_text(encoding="utf-8")
    assert json.loads(dashboards[0]["data"]["shoal.json"]) == json.loads(text)
    assert not any(of_kind(case("defaults"), kind) for kind in ("ServiceMonitor", "PodMonitor", "PrometheusRule"))


def test_evictions_take_one_at_a_time() -> None:
    least = {
        budget["spec"]["selector"]["matchLabels"]["shoal/part"]: budget["spec"]["minAvailable"]
        for budget in of_kind(case("models-and-variants"), "PodDisruptionBudget")
    }
    assert least == {"router": 3, "stable": 2, "next": 1, "small": 1}
    assert not of_kind(case("cpu"), "PodDisruptionBudget")


def test_who_may_connect() -> None:
    ray, api, redis = of_kind(case("defaults"), "NetworkPolicy")
    assert {port["port"] for rule in ray["spec"]["ingress"] for port in rule.get("ports", ())} == {
        *(8265, 8000, 52365),
        *(8080, 9400),
    }
    assert all(rule["from"] for rule in ray["spec"]["ingress"])  # nobody from everywhere
    assert api["spec"]["ingress"] == [{"ports": [{"port": 8000}]}]  # but to the API
    assert api["spec"]["podSelector"]["matchLabels"]["shoal/part"] == "router"
    assert redis["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in redis["spec"]
    assert len(of_kind(case("no-redis"), "NetworkPolicy")) == 2
    assert not of_kind(case("cpu"), "NetworkPolicy")
    clients = [{"namespaceSelector": {"matchLabels": {"team": "a"}}}]
    _, api, _ = of_kind(manifests({"networkPolicy": {"clients": clients}}), "NetworkPolicy")
    assert api["spec"]["ingress"][0]["from"][0] == clients[0]


def test_alerts_lead_where_the_runbook_is_published() -> None:
    """By default to its path in the repository."""
    page = "https://wiki.example/shoal/OPERATING.md"
    for monitoring, base in (({}, "docs/OPERATING.md"), ({"runbookUrl": page}, page)):
        (rule,) = of_kind(manifests({"monitoring": {"alerts": True, **monitoring}}), "PrometheusRule")
        found = [each["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for each in group["rules"]]
        assert found
        assert all(url.startswith(f"{base}#shoal") for url in found)


@pytest.mark.parametrize("length", [2, 46, 47])
def test_names_fit_what_is_made_of_them(length: int) -> None:
    """A StatefulSet's pods have its name in a label, with a hyphen and a hash of ten digits behind it."""
    everything = {"enabled": True}
    options = {"redis": {"tls": everything}, "ingress": everything, "monitoring": {"dashboard": True, "alerts": True}}
    found = manifests({"fullnameOverride": "n" * length, **options})
    for each in found:
        assert len(each["metadata"]["name"]) <= (52 if each["kind"] == "StatefulSet" else 63), each["kind"]
    (state,) = of_kind(found, "StatefulSet")
    assert state["spec"]["serviceName"] in [each["metadata"]["name"] for each in of_kind(found, "Service")]
    server = yaml.safe_load(ray_service(found)["spec"]["serveConfigV2"])["applications"][0]["args"]["server"]
    assert state["metadata"]["name"] in server["redis_url"]


@pytest.mark.parametrize("name", ["true", "null", "1e3"])
def test_a_release_whose_name_is_no_text_to_yaml(name: str) -> None:
    done = template({"fullnameOverride": "shoal", "variants": [{"name": "on"}]}, name=name)
    assert done.returncode == 0, done.stderr
    found = [each for each in yaml.safe_load_all(done.stdout) if each]
    for manifest in found:
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == name
    assert group(ray_service(found), "on")["labels"] == {"shoal/part": "on"}


@pytest.mark.parametrize(
    ("ca", "file"), [("", "/etc/ssl/certs/ca-certificates.crt"), ("ca", "/etc/shoal/redis/ca.crt")]
)
def test_the_head_trusts_whom_the_ingresses_trust(ca: str, file: str) -> None:
    """Ray knows no CA of its own: without yours it is told of the image's, which the Dockerfile installs."""
    external = {"url": "rediss://cache.example", "existingSecret": "cache", "caSecret": ca}
    service = ray_service(manifests({"redis": {"mode": "external", "external": external}}))
    assert environment(pod_templates(service)["head"]["spec"]["containers"][0])["RAY_REDIS_CA_CERT"] == file
    assert "ca-certificates" in (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("FROM")[2]


def test_notes_name_the_ray_service_whatever_leads_to_it() -> None:
    upgrade = "cluster.upgrade.type=NewClusterWithIncrementalUpgrade,cluster.upgrade.gatewayClassName=istio"
    done = helm("install", "release", str(CHART), "-n", "llm", "--dry-run=client", "--set", upgrade)
    assert "rayservice/release-shoal --timeout" in done.stdout, done.stderr


def test_notes_say_what_comes_next() -> None:
    assert HELM.exists()
    done = helm("install", "release", str(CHART), "-n", "llm", "--dry-run=client")
    notes = done.stdout.partition("NOTES:")[2]
    assert "helm -n llm test release" in notes, done.stderr
    assert "port-forward service/release-shoal 8000:80" in notes
    assert template({}).returncode == 0
