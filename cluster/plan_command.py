"""The `plan` command's flags. What they say is read in `plan.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import ConfigError
from .flags import with_flags

ENGINE_FIELDS = (
    "dtype",
    "kv_cache_dtype",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "block_size",
    "enforce_eager",
    "deterministic",
)
_MODEL_HELP = "A folder, a hub id already in the local cache, a .gguf file or a config.json: weights need not be there."


@with_flags([("engine", name) for name in ENGINE_FIELDS])
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)],
    *,
    gpu: Annotated[str, typer.Option(metavar="TYPE|TYPE:N,...", help="As H200, or H100:4,A100:4; cpu: this machine.")],
    count: Annotated[int | None, typer.Option(help="How many of it.  [default: 1]")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Tensor parallelism stays in one [8].")] = None,
    context: Annotated[str | None, typer.Option(help="The longest sequence, as 8k; default: the model's own.")] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a typical prompt.")] = "1k",
    answer: Annotated[str, typer.Option(help="Tokens of a typical answer.")] = "300",
    rate: Annotated[str | None, typer.Option(help="Requests that come, as 5/s: the cheapest that keeps up.")] = None,
    ttft: Annotated[str | None, typer.Option(help="Objective: nine of ten first tokens within, as 500ms.")] = None,
    itl: Annotated[str | None, typer.Option(help="Objective: time between tokens, as 30ms.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="none, int4, int8, w8a8 or fp8, of a model that is not; default: as stored.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="USD an hour and GPU, instead of the table's.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of `shoal bench kernels` or `engine` on such a GPU.")
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="shoal.yaml, or the chart's values.yaml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Find the grid for a model and some GPUs, before anybody buys them.

    Memory by the engine's own formulas; time by a roofline and the real scheduler on a virtual clock.
    """
    from .plan import Asked, make_plan, make_problem
    from .plan_model import QUANTIZATIONS
    from .plan_report import as_json as plan_json
    from .plan_report import report
    from .plan_writer import check_target, write_plan

    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization {quantization}: possible are {', '.join(QUANTIZATIONS)}")
    if write is not None:
        check_target(write)
    asked = Asked(
        model=model,
        gpu=gpu,
        count=count,
        gpus_per_node=gpus_per_node,
        context=context,
        prompt=prompt,
        answer=answer,
        rate=rate,
        ttft=ttft,
        itl=itl,
        quantization=quantization,
        price=price,
        calibrate=calibrate,
    )
    made = make_plan(make_problem(asked, overrides))
    if as_json:
        import json

        print(json.dumps(plan_json(made), indent=1))
    else:
        print(report(made))
    if write is not None:
        write_plan(made, write)
