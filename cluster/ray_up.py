"""`shoal ray-up`: the folder that `ray up` is run in, and what can be refused before it costs anything.

Ray's cluster file says where machines come from, `shoal.yaml` what they serve. Both, `node.sh` and the secrets lie in
one folder (docs/DEPLOY_RAY_UP.md); `init` makes it, `check` looks through it. Ray's own check of its file has the last
word; before it we name the line and the nearest known key, and look at what Ray does not ask: whether the grid fits the
machines, whether files and secrets are there, whether the commands still set what Serve must have.

Nodes ask, as well: `python -m shoal.cluster.ray_up models shoal.yaml`, `... workers ray_bootstrap_config.yaml`.
"""

from __future__ import annotations

import json
import secrets
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from ..runtime.errors import ConfigError
from ..runtime.hub import HUB_ID
from .config import ShoalConfig, load_config
from .parts import parts

SHIPPED = Path(__file__).parent / "ray-up"
CLOUDS = ("aws", "gcp", "azure", "on-premises")
NODE = "node"
"""The folder beside the cluster file that goes to every machine, as ~/shoal."""

CONFIG, NODE_SCRIPT = "shoal.yaml", "node.sh"
TOKEN, SECRET, REDIS_PASSWORD, API_KEYS = "auth-token", "secret", "redis-password", "api-keys"

START = """\
# What the cluster serves: docs/CONFIGURATION.md. Where the secrets lie that are beside this file, and which Redis there
# is, node.sh adds when it deploys.
engine:
  model: {model}

server:
  host: 0.0.0.0 # routers reach one another; who else may come in is the firewall's affair, and needs a key
  ingress_node_labels: {{shoal/role: router}}
"""


def init(folder: Path, cloud: str, model: str, *, wheel: Path | None = None) -> None:
    """Make the folder: a cluster file, and `node/` with a start of shoal.yaml and secrets of its own (0600).

    Raises:
        ConfigError: an unknown cloud, a folder that is there and not empty, or no such wheel.
    """
    if cloud not in CLOUDS:
        raise ConfigError(f"{cloud!r} is none of the clouds that a cluster file comes for: {', '.join(CLOUDS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not empty: name a new folder")
    if wheel is not None and not (wheel.is_file() and wheel.match("shoal-*.whl")):
        raise ConfigError(f"--wheel {wheel}: no such file, or not shoal-VERSION-py3-none-any.whl")
    node = folder / NODE
    node.mkdir(parents=True)
    node.chmod(stat.S_IRWXU)
    shutil.copy(SHIPPED / f"{cloud}.yaml", folder)
    shutil.copy(SHIPPED / NODE_SCRIPT, node)
    import yaml

    from .keys import new_key

    quoted, _, _ = yaml.safe_dump(model, width=10**6, allow_unicode=True).partition("\n")
    (node / CONFIG).write_text(START.format(model=quoted))

    for name, value in (
        (TOKEN, secrets.token_hex(32)),
        (SECRET, secrets.token_hex(32)),
        (REDIS_PASSWORD, secrets.token_hex(32)),
        (API_KEYS, new_key()),
    ):
        file = node / name
        file.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        file.write_text(value + "\n")
    if wheel is not None:
        shutil.copy(wheel, node)


def hub_ids(config: ShoalConfig) -> list[str]:
    """What every node must have in its hub cache: models named by id, of all parts, without repetition."""
    named = [name for part in parts(config) for name in (part.engine.model, part.engine.speculative_model)]
    found = [name for name in named if name and HUB_ID.fullmatch(name) and not Path(name).expanduser().exists()]
    return list(dict.fromkeys(found))


def _models(file: Path) -> list[str]:
    return hub_ids(load_config({}, file=file))


def _workers(file: Path) -> list[str]:
    """`user@address` of each machine with a fixed address; none where a cloud's are, and where there is no file."""
    if not file.exists():
        return []
    tree = json.loads(file.read_text())
    return [f"{tree['auth']['ssh_user']}@{address}" for address in tree["provider"].get("worker_ips", ())]


def main(question: str, file: Path) -> None:
    """Answer a node's question, a line for each."""
    questions: dict[str, Callable[[Path], list[str]]] = {"models": _models, "workers": _workers}
    for line in questions[question](file):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
