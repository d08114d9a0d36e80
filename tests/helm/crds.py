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
