"""The pick as a deployment file: `shoal.yaml`, or values for the chart, which have the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.errors import ConfigError
from ..runtime.hub import HUB_ID
from .plan import Plan
from .plan_report import quantised_name


def check_target(file: Path) -> None:
    """Raises ConfigError: not a file that can be written."""
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--write {file}: expected shoal.yaml, or a name with `values` in it for the chart's")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--write {file}: there is no folder {file.absolute().parent}")


def write_plan(plan: Plan, file: Path) -> None:
    """Write the pick; a name with `values` in it gets what the chart asks for besides. Raises ConfigError."""
    import yaml

    tree, lines = deployment(plan), _comment(plan)
    if "values" in file.stem:
        tree["engine"]["device"] = plan.problem.config.device
        stages = plan.pick.layout.stages
        per_pod = plan.problem.per_node if len(set(stages)) == 1 else plan.pick.layout.tp  # no machine has two types
        tree["cluster"] = {"replica": {"gpusPerNode": per_pod}}
        if plan.problem.model.to_quantise is not None or not HUB_ID.fullmatch(tree["engine"]["model"]):
            tree["weights"] = {"source": "image"}
            lines.append(
                "The image must have the model at this place; for other sources see weights in the chart's values."
            )
    text = yaml.safe_dump(tree, sort_keys=False)
    try:
        file.write_text("".join(f"# {line}\n" for line in lines) + text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write {file}: {error.strerror or error}") from None


def deployment(plan: Plan) -> dict[str, Any]:
    """The keys of `ShoalConfig` that say the pick, and what the operator has said; all else is at its default."""
    pick, problem = plan.pick, plan.problem
    model = problem.model
    name = model.name if model.to_quantise is None else quantised_name(model.name, model.to_quantise)
    engine: dict[str, Any] = {"model": name, "tensor_parallel_size": pick.layout.tp}
    if pick.layout.grid.pp > 1:
        engine["pipeline_parallel_size"] = pick.layout.grid.pp
    if pick.grid.pp_layers is not None:
        engine["pp_layers"] = list(pick.grid.pp_layers)
    engine["max_model_len"] = problem.demand.context
    engine |= problem.config.model_dump(mode="json", include=set(problem.told))
    return {"engine": engine, "server": {"replicas": pick.layout.replicas}}


def _comment(plan: Plan) -> list[str]:
    pick = plan.pick
    gpus = ", ".join(f"{pool.count} x {pool.gpu.name}" for pool in plan.problem.pools)
    lines = [
        f"Planned for {gpus}: {pick.layout}, {pick.layout.num_gpus} GPUs, {pick.grid.kv_tokens:,} KV tokens a replica."
    ]
    if pick.grid.pp_layers is not None and len(set(pick.layout.stages)) > 1:
        lines.append(f"Stages lie on {', '.join(gpu.name for gpu in pick.layout.stages)}, in this order.")
    return lines
