"""Writes dashboard and alert rules into the chart, from where examples/monitoring/ reads them, too.

`python -m shoal.cluster.monitoring`, in the root of the repository. tests/cluster/test_monitoring.py holds the files to
this, and every expression to metrics and labels that `/metrics` has.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from .monitoring_alerts import all_alerts, rules
from .monitoring_dashboard import dashboard

FOLDER = Path("helm/shoal/files")


def files() -> dict[str, str]:
    """Name -> text of each file."""
    return {
        "dashboard.json": json.dumps(dashboard(), indent=1) + "\n",
        "alerts.yaml": yaml.safe_dump(rules(all_alerts()), sort_keys=False, width=110),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
