"""Holds manifests against the schemas of custom resources as an API server does that refuses unknown fields."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

PLAIN = ("default", "enum", "required", "example")  # their values are no schemas
LEFT_OUT = ("format", "description", "nullable")


def validators(folder: Path) -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    """(apiVersion, kind) -> what its manifests must be, of all definitions in the folder."""
    found = {}
    for file in folder.glob("*.yaml"):
        definition = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        for version in definition["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {"type": "object"}
            api = f"{definition['group']}/{version['name']}"
            found[api, definition["names"]["kind"]] = jsonschema.Draft7Validator(strict(schema))
    return found


def repeated(schema: Any, value: Any, path: str = "") -> Iterator[str]:
    """Where two entries of a list have one key, which an API server refuses of lists that it takes for maps."""
    if isinstance(value, dict):
        for name, below in value.items():
            fields = schema.get("properties", {})
            yield from repeated(fields.get(name) or {}, below, f"{path}/{name}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys", ())
        seen = [tuple(entry.get(key) for key in keys) for entry in value] if keys else []
        yield from (f"{path}: {key}" for i, key in enumerate(seen) if key in seen[:i])
        for i, entry in enumerate(value):
            yield from repeated(schema.get("items") or {}, entry, f"{path}/{i}")


def ray_service_schema(folder: Path) -> Any:
    """The RayService's own, as it is written."""
    (file,) = folder.glob("*rayservices*.yaml")
    definition = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
    (version,) = [each for each in definition["versions"] if each["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def strict(schema: Any) -> Any:
    """A JSON schema of an OpenAPI one. Fields that it does not name are refused, unless it says to keep them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = dict(_translated(schema))
    if "properties" in schema:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        # Defaults are filled in before anything is checked.
        filled = {name for name, field in schema["properties"].items() if "default" in field}
        result["required"] = [name for name in schema.get("required", ()) if name not in filled]
    if schema.get("nullable") and "type" in result:
        result["type"] = [result["type"], "null"]
    return result


def _translated(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in schema.items():
        if key == "properties":
            yield key, {name: strict(field) for name, field in value.items()}
        elif not (key.startswith("x-kubernetes-") or key in LEFT_OUT):
            yield key, value if key in PLAIN else strict(value)
