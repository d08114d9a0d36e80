"""Makes shoal/values.schema.json: what the config models say of shoal.yaml, and the chart's own keys beside it.

`python helm/schema.py` writes it; tests/helm hold the file equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from shoal.cluster.config import ShoalConfig

HELM = Path(__file__).parent
TARGET = HELM / "shoal" / "values.schema.json"
THE_CHARTS = {
    "RouterConfig": ("api_keys", "api_key_file", "secret", "secret_file", "chat_template"),
    "ServerConfig": (
        *("host", "port", "metrics_port", "metrics_host", "redis_url", "redis_password_file"),
        *("startup_timeout_s", "shutdown_timeout_s"),
        *("node_labels", "ingress_node_labels", "smaller_model"),
    ),
    "VariantConfig": ("node_labels",),
    "ModelConfig": ("node_labels",),
}
"""What the chart settles itself: addresses, files, Redis and placement. Nobody may say it in values."""


def values_schema() -> dict[str, Any]:
    """Of the chart's values; unknown keys are refused at every level."""
    chart = yaml.safe_load((HELM / "values.schema.yaml").read_text(encoding="utf-8"))
    config = _without_titles(ShoalConfig.model_json_schema())
    for name, fields in THE_CHARTS.items():
        for field in fields:
            config["$defs"][name]["properties"].pop(field, None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **chart,
        "properties": config["properties"] | chart["properties"],
        "$defs": config["$defs"] | chart["$defs"],
    }


def text() -> str:
    """As it is in the chart."""
    return json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n"


def _without_titles(schema: Any) -> Any:
    """Pydantic's titles repeat the names."""
    if isinstance(schema, list):
        return [_without_titles(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _without_titles(field) for name, field in value.items()}
        if key == "properties"
        else _without_titles(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
