"""What `shoal.yaml` may say, for editors and for readers: its JSON schema, and docs/CONFIGURATION.md.

`python -m shoal.cluster.config_doc`, in the repository's root, writes both anew; tests hold them equal to the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..runtime.config import EngineConfig
from .config import ShoalConfig, flag_of
from .config_errors import nested
from .flags import SERVE_FLAGS
from .serve_config import INGRESS_SERVER, PART_ROUTER, PART_SERVER

SCHEMA_FILE = Path(__file__).with_name("shoal.schema.json")
_REFERENCE = "#/$defs/"
_LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} characters or more",
    "pattern": "`{}`",
}
_KINDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false", "object": "mapping"}

_HEAD = """\
# Configuration

Generated from the models that read it (`python -m shoal.cluster.config_doc`). One deployment is one `shoal.yaml`,
whichever way it is deployed; the Helm chart's values have the same keys. All have defaults but `engine.model`.

```yaml
# yaml-language-server: $schema=./shoal.schema.json
engine:
  model: Qwen/Qwen3-8B
  tensor_parallel_size: 2
autoscaling:
  max_replicas: 4
```

`shoal config schema > shoal.schema.json` makes the file that this first line names: editors then complete keys and mark
what is wrong. Loading refuses it, too, all problems at once, each with its line and the nearest key that there is:

    shoal.yaml:12: unknown key router.max_inflight; did you mean router.max_in_flight?

A flag has its field's name (`--max-model-len` is `engine.max_model_len`) and wins over the file. `shoal config show`
prints what results and where each value comes from, `shoal config serve-config` the Serve config that is applied.
Anchors and merges are as in YAML; a key that is given twice is refused, so is a number or a switch in quotes.

## What a change does

With `shoal deploy`, `ray up` and Helm alike; `shoal deploy --dry-run` says it beforehand. What is not named goes on
undisturbed.

| changed | what happens |
|---|---|
| `rollout` | in place: the running ingresses take it over, streams do not notice |
| `autoscaling`, `replicas`, `server.replicas`, `server.ingresses` | in place: some are added, or drained and ended |
| `server.max_surge_percent` | in place |
| `variants`, `models`: one more, one less | its part is started beside the others, or drained and ended |
| `engine`, `server.node_labels` | the replicas of `stable`, and of parts that inherit what changed, are replaced |
| `engine`, `node_labels` of a variant or a model | the replicas of that part are replaced |
| `server`: {parts} | the replicas of all parts are replaced |
| {everywhere} | the ingresses and the replicas of all parts are replaced |
| all else of `router`; `server`: {ingress} | the ingresses are replaced |
| `server.host`, `server.port` | refused while Serve runs: it listens where it was started |
| all else of `server` | it is for `shoal serve`, or for the next start |

Who is replaced is drained first: see `server.drain_timeout_s` and `ingress_drain_timeout_s`.
"""


def schema() -> dict[str, Any]:
    """JSON schema of `shoal.yaml`. Nothing is required: `engine.model` may be given as an argument."""
    made = ShoalConfig.model_json_schema()
    for model in (made, made["$defs"][EngineConfig.__name__]):
        model.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": "shoal.yaml"}


def document() -> str:
    """The page."""
    both = [name for name in INGRESS_SERVER if name in PART_SERVER]
    head = _HEAD.format(
        parts=_code(name for name in PART_SERVER if name not in both),
        everywhere=_code([*(f"router.{name}" for name in PART_ROUTER), *(f"server.{name}" for name in both)]),
        ingress=_code(["ingress_node_labels", *(name for name in INGRESS_SERVER if name not in both)]),
    )
    return "\n".join([head, *_sections()])


def _sections() -> Iterator[str]:
    """One for each mapping that the file may hold, outer before inner; what is said once is linked afterwards."""
    definitions = schema()["$defs"]
    homes: dict[type[BaseModel], str] = {}
    waiting: list[tuple[str, type[BaseModel]]] = [("", ShoalConfig)]
    while waiting:
        path, model = waiting.pop(0)
        for name, info in model.model_fields.items():
            below = nested(info.annotation)
            if below is not None and not issubclass(below, tuple(homes)):  # a subclass: an `engine` within a part
                homes[below] = _path(path, name, info.annotation)
                waiting.append((homes[below], below))
        if path:
            yield _section(path, model, definitions[model.__name__], {one.__name__: at for one, at in homes.items()})


def _path(above: str, name: str, annotation: Any) -> str:
    is_list = "tuple" in str(annotation)
    return f"{above}{'.' if above else ''}{name}{'[]' if is_list else ''}"


def _section(path: str, model: type[BaseModel], definition: Mapping[str, Any], homes: Mapping[str, str]) -> str:
    rows = []
    for name, value in definition["properties"].items():
        secret = not model.model_fields[name].repr
        text = value.get("description", "") + (" Never shown." if secret else "")
        flag = f"`{flag_of(name)}`" if (path, name) in SERVE_FLAGS else ""
        default = _default(value, required=name in definition.get("required", ()))
        rows.append(
            f"| `{name}` | {_kind(value, homes)} | {default} | {_limits(value)} | {flag} | {_escaped(text)} |\n"
        )
    summary = (model.__doc__ or "").strip().split("\n")[0]
    table = "| key | type | default | limits | flag | what |\n|---|---|---|---|---|---|\n" + "".join(rows)
    return f"## {path}\n\n{summary}\n\n{table}"


def _alternatives(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in value.get("anyOf", [value]) if one.get("type") != "null"]


def _kind(value: Mapping[str, Any], homes: Mapping[str, str]) -> str:
    (only,) = _alternatives(value)
    if reference := only.get("$ref"):
        return _link(reference.removeprefix(_REFERENCE), homes)
    if "enum" in only:
        return " ".join(f"`{choice}`" for choice in only["enum"])
    if "const" in only:
        return f"`{only['const']}`"
    if only["type"] == "array":
        return f"list of {_kind(only['items'], homes)}"
    inner = only.get("additionalProperties") or next(iter(only.get("patternProperties", {}).values()), None)
    if isinstance(inner, dict):
        return f"mapping of name to {_kind(inner, homes)}"
    return "path" if only.get("format") == "path" else _KINDS[only["type"]]


def _link(name: str, homes: Mapping[str, str]) -> str:
    if name in homes:
        return f"[{homes[name]}](#{homes[name].replace('.', '').replace('[]', '')})"
    return "keys of [engine](#engine)"


def _limits(value: Mapping[str, Any]) -> str:
    (only,) = _alternatives(value)
    inner = only.get("items") or only.get("additionalProperties")
    holders = [only, inner] if isinstance(inner, dict) else [only]
    limits = [
        text.format(f"{limit:g}" if isinstance(limit := holder[name], float) else limit)
        for holder in holders
        for name, text in _LIMITS.items()
        if name in holder
    ]
    return _escaped(", ".join(limits))


def _default(value: Mapping[str, Any], *, required: bool) -> str:
    if required:
        return "(must be given)"
    default = value.get("default")
    if default in (None, [], {}, ""):
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def rendered(made: Mapping[str, Any]) -> str:
    """JSON as it is written to a file."""
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(rendered(schema()), encoding="utf-8")
    Path("docs/CONFIGURATION.md").write_text(document(), encoding="utf-8")
