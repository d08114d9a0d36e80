"""`shoal ray-up check`: all that is wrong with a cluster file and its folder, a line for each problem."""

from __future__ import annotations

import copy
import json
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.errors import ConfigError
from .config import ShoalConfig, is_loopback, load_config
from .parts import parts
from .preflight import grid_problems
from .ray_up import API_KEYS, CONFIG, NODE_SCRIPT, REDIS_PASSWORD, SECRET, TOKEN
from .secret import LENGTH as SECRET_LENGTH
from .secret import api_keys_in
from .serve_config import deployed
from .yaml_lines import Step, YamlFile

ON_NODES = "~/shoal/"
SETTINGS = ". ~/.shoal/env &&"
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
_PROVIDER_KEYS = (  # that Ray reads beside those its schema lists
    "use_internal_ips",
    "use_external_head_ip",
    "external_head_ip",
    "coordinator_address",
    "vpc_id",
    "subnet_mask",
    "unique_id",
    "aws_credentials",
)
_SECRET_FILES = (TOKEN, SECRET, REDIS_PASSWORD, API_KEYS)
_NEEDED = ("cluster_name", "provider", "auth", "file_mounts", "head_start_ray_commands", "worker_start_ray_commands")
_NEEDED_IN_CLOUDS = ("max_workers", "head_node_type", "available_node_types")
_CLUSTER_NAME = "[a-z]([-a-z0-9]{0,33}[a-z0-9])?"  # machines are named after it, with 28 characters around it


def check(file: Path) -> None:
    """Returns if nothing is wrong.

    Raises:
        ConfigError: a line for each problem: the place, what it is, and what to do.
    """
    said = YamlFile(file)
    if not isinstance(said.tree, dict):
        raise ConfigError(f"{file}: the root is not a mapping: take one of the files that come with shoal")
    checks = (_kinds, _unknown_keys, _missing, _as_written, _of_ray, _of_folder, _of_deployment)
    for problems in (look(said) for look in checks):
        if found := list(problems):  # what comes later rests on what came before
            raise ConfigError("\n".join(found))


def _kinds(said: YamlFile) -> Iterator[str]:
    """What is not of the kind that Ray's schema says: its code stumbles over that before it looks."""
    from jsonschema import Draft7Validator

    for error in Draft7Validator(_schema()).iter_errors(said.tree):
        if error.validator not in ("required", "additionalProperties"):
            at = list(error.absolute_path)
            yield f"{said.place(at)}: {_dotted(at)}: {error.message:.200}"


def _missing(said: YamlFile) -> Iterator[str]:
    """What Ray asks for late or makes up: its own commands, say, which start Ray without what Serve needs."""
    tree = said.tree
    provider = tree.get("provider")
    is_cloud = isinstance(provider, Mapping) and provider.get("type") != "local"
    for name in (*_NEEDED, *(_NEEDED_IN_CLOUDS if is_cloud else ())):
        if name not in tree:
            yield f"{said.file}: {name} is missing; the files that come with shoal say what it is"
    for path in (("provider", "type"), ("auth", "ssh_user")):
        if path[0] in tree and path[1] not in tree[path[0]]:
            yield f"{said.place(path)}: {_dotted(path)} is missing"


def _as_written(said: YamlFile) -> Iterator[str]:
    """Names that no machine can have, addresses given twice, and what was left to fill in."""
    tree = said.tree
    if tree["provider"]["type"] == "local":
        addresses = [tree["provider"].get("head_ip"), *tree["provider"].get("worker_ips", ())]
        for i, address in enumerate(addresses[1:]):
            if address in addresses[: i + 1]:
                yield f"{said.place(('provider', 'worker_ips', i))}: {address} is there twice; the head is no worker"
    else:
        name, head = tree["cluster_name"], tree["head_node_type"]
        if not re.fullmatch(_CLUSTER_NAME, name):
            yield (
                f"{said.place(('cluster_name',))}: cluster_name {name:.60} names machines: a lower-case letter, then "
                "lower-case letters, digits and hyphens, at most 35 in all"
            )
        if head not in tree["available_node_types"]:
            known = ", ".join(tree["available_node_types"])
            yield f"{said.place(('head_node_type',))}: head_node_type {head} is none of available_node_types: {known}"
    for path, value in _scalars(said.tree, ()):
        if isinstance(value, str) and re.fullmatch("<.*>", value):
            yield f"{said.place(path)}: {_dotted(path)} is still {value}: fill it in"


def _unknown_keys(said: YamlFile) -> Iterator[str]:
    root = _schema()["properties"]
    node_type = root["available_node_types"]["patternProperties"][".*"]["properties"]
    root = {**root, "min_workers": {}}  # of machines with addresses
    levels: list[tuple[tuple[Step, ...], Sequence[str]]] = [((), list(root))]
    levels += [((section,), list(root[section]["properties"])) for section in ("auth", "docker", "provider")]
    levels += [
        (("available_node_types", name), list(node_type)) for name in said.tree.get("available_node_types") or {}
    ]
    for path, known in levels:
        tree = _at(said.tree, path)
        of_provider = path == ("provider",)  # its keys are the cloud's, too: only what looks like a slip is refused
        for key in tree if isinstance(tree, Mapping) else ():
            if key in known or (of_provider and key in _PROVIDER_KEYS):
                continue
            near = get_close_matches(str(key), [*known, *(_PROVIDER_KEYS if of_provider else ())], n=1)
            if near or not of_provider:
                hint = f"did you mean {_dotted((*path, near[0]))}?" if near else f"known here: {', '.join(known)}"
                yield f"{said.place((*path, key))}: unknown key {_dotted((*path, key))}; {hint}"


def _of_ray(said: YamlFile) -> Iterator[str]:
    """What Ray itself says, and its commands."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.cli_logger import SilentClickException
    from ray.autoscaler._private.util import prepare_config, validate_config

    words = StringIO()
    try:
        with redirect_stdout(words):
            validate_config(prepare_config(copy.deepcopy(said.tree)))
    except ValidationError as error:
        at = list(error.absolute_path)
        yield f"{said.place(at)}: {_dotted(at) or 'the root'}: {error.message:.200}"
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, SilentClickException) as error:
        yield f"{said.file}: Ray refuses it: {words.getvalue().strip() or error}"
    for path, command in _commands(said.tree):
        place = said.place(path)
        shell = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
        if shell.returncode:
            yield f"{place}: bash cannot read this command: {shell.stderr.strip()}"
        if "ray start" in command and SETTINGS not in command:
            yield f"{place}: Ray is started without the settings that Serve needs: `{SETTINGS} ray start ...`"
        host = re.search(r"--dashboard-host[= ](\S+)", command)
        if host and not is_loopback(host[1]):
            yield f"{place}: --dashboard-host {host[1]}: who reaches it governs the cluster: 127.0.0.1, and a tunnel"


def _of_folder(said: YamlFile) -> Iterator[str]:
    """Files that go to the nodes."""
    mounts = said.tree.get("file_mounts") or {}
    for remote, local in mounts.items():
        path = said.file.parent / Path(local).expanduser()
        if not path.exists():
            yield f"{said.place(('file_mounts', remote))}: {local} is not there (`ray up` is run in {said.file.parent})"
    node = _node_folder(said)
    if node is None:
        yield f"{said.place(('file_mounts',))}: file_mounts brings nothing to {ON_NODES}; `shoal ray-up init` makes it"
        return
    for name in (NODE_SCRIPT, CONFIG, *_SECRET_FILES):
        file = node / name
        if not file.is_file():
            if name == API_KEYS:  # tenants may have them all
                continue
            yield f"{file} is missing; `shoal ray-up init` makes a folder with all that is needed"
        elif name in _SECRET_FILES and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield f"{file}: others can read this secret: chmod 600 it"
        elif name in _SECRET_FILES:
            yield from _of_secret(name, file)
    wheels = sorted(node.glob("*.whl"))
    if len(wheels) > 1:
        yield f"{node} has {len(wheels)} wheels, {', '.join(wheel.name for wheel in wheels)}: leave one"


def _of_secret(name: str, file: Path) -> Iterator[str]:
    """What cannot be a secret of that name."""
    try:
        if name == API_KEYS:
            api_keys_in(file)
            return
        length = len(file.read_text(encoding="utf-8").strip())
    except ConfigError as error:
        yield str(error)
        return
    except (OSError, UnicodeDecodeError) as error:
        yield f"{file} cannot be read: {error}"
        return
    least = SECRET_LENGTH if name == SECRET else 1
    if length < least:
        yield f"{file} has {length} characters and needs at least {least}: `openssl rand -hex 32` makes them"


def _of_deployment(said: YamlFile) -> Iterator[str]:
    """shoal.yaml, by itself and on these machines."""
    node = _node_folder(said)
    assert node is not None, "that was asked before"
    there = Path("/home/shoal")  # somewhere: only the node knows where its home is
    overrides: dict[tuple[str, str], Any] = {("router", "secret_file"): there / SECRET}
    if (node / API_KEYS).exists():
        overrides["router", "api_key_file"] = there / API_KEYS
    if any("node.sh redis" in command for _, command in _commands(said.tree)):
        overrides |= {
            ("server", "redis_url"): "redis://head",
            ("server", "redis_password_file"): there / REDIS_PASSWORD,
        }
    config = load_config(
        overrides, file=node / CONFIG, checks=(deployed, grid_problems)
    )  # as `node.sh deploy` gives it
    if is_loopback(config.server.host):
        yield (
            f"{node / CONFIG}: server.host is {config.server.host}: then a proxy does not reach a router on another "
            "machine; 0.0.0.0, and the firewall decides who comes in"
        )
    if said.tree["provider"]["type"] != "local":  # there the machines themselves say what they have
        yield from _too_large(config, said)


def _too_large(config: ShoalConfig, said: YamlFile) -> Iterator[str]:
    """Parts that no machine, or not enough of them, could hold. Only upper bounds: Ray packs them."""
    types = {name: entry for name, entry in said.tree["available_node_types"].items() if _gpus(entry)}
    place = said.place(("available_node_types",))
    routers = config.server.ingress_node_labels
    if not any(_labelled(routers, entry) for entry in said.tree["available_node_types"].values()):
        yield f"{place}: routers want the labels {routers} (server.ingress_node_labels), which no type of machine has"
    needed = 0
    for part in parts(config):
        if part.engine.device == "cpu":
            continue
        tp, pp = part.engine.tensor_parallel_size, part.engine.pipeline_parallel_size
        fitting = [entry for entry in types.values() if _labelled(part.node_labels, entry) and _gpus(entry) >= tp]
        if not fitting:
            labels = f" with the labels {dict(part.node_labels)}" if part.node_labels else ""
            offers = ", ".join(f"{name}: {_gpus(entry)}" for name, entry in types.items())
            yield (
                f"{place}: {part.name} needs {tp} GPUs on one machine{labels} (tensor_parallel_size), and there is no "
                f"such type ({offers}): lower it, or add a type of machine"
            )
        needed += part.most_replicas * tp * pp
    sizes = [
        _gpus(entry) for entry in types.values() for _ in range(entry.get("max_workers", said.tree["max_workers"]))
    ]
    most = sum(sorted(sizes, reverse=True)[: said.tree["max_workers"]])
    if needed > most:
        yield (
            f"{said.place(('max_workers',))}: all replicas need up to {needed} GPUs, and max_workers lets there "
            f"be {most}: raise it, or lower replicas or max_replicas"
        )


def _schema() -> dict[str, Any]:
    """Ray's own, of a cluster file."""
    import ray.autoscaler

    found: dict[str, Any] = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return found


def _gpus(node_type: Mapping[str, Any]) -> int:
    return int((node_type.get("resources") or {}).get("GPU", 0))


def _labelled(wanted: Mapping[str, str], node_type: Mapping[str, Any]) -> bool:
    return wanted.items() <= (node_type.get("labels") or {}).items()


def _node_folder(said: YamlFile) -> Path | None:
    for remote, local in (said.tree.get("file_mounts") or {}).items():
        if PurePosixPath(remote) == PurePosixPath(ON_NODES):
            return said.file.parent / Path(local).expanduser()
    return None


def _commands(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[Step, ...], str]]:
    node_types = tree.get("available_node_types") or {}
    for above in ((), *(("available_node_types", name) for name in node_types)):
        for name in _COMMANDS:
            for index, command in enumerate(_at(tree, above).get(name) or ()):
                yield (*above, name, index), str(command)


def _scalars(tree: Any, path: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], Any]]:
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if entries is None:
        yield path, tree
        return
    for step, below in entries:
        yield from _scalars(below, (*path, step))


def _at(tree: Any, path: Sequence[Step]) -> Any:
    for step in path:
        tree = tree.get(step) or {}
    return tree


def _dotted(path: Sequence[Step]) -> str:
    from .config_errors import dotted

    return dotted(path)
