"""`shoal bench`: what a running server gives its clients; what the engine, the kernels and a start cost here.

Only flags are read here; each command imports what it needs when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..runtime.errors import ConfigError
from .flags import section_fields, with_flags

ENGINE_FLAGS = section_fields("engine", skip=("model",))
START_FLAGS = [*section_fields("server"), *ENGINE_FLAGS]

bench = typer.Typer(
    help="Measure a server, the engine, its kernels, or a start.", no_args_is_help=True, rich_markup_mode=None
)

MODEL_HELP = "A folder, a hub id already in the local cache, or a .gguf file; default: the demo model."
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured there, too.")]

RANGE = "N[:M]"
LoadName = Literal["random", "sharegpt", "shared-prefix"]


@bench.command()
def serve(
    *,
    url: Annotated[str, typer.Option(help="Of OpenAI's API, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: the first of /v1/models.")] = None,
    endpoint: Annotated[Literal["completions", "chat"], typer.Option()] = "completions",
    rate: Annotated[str | None, typer.Option(metavar="R[,R...]", help="Open loop: requests a second.")] = None,
    concurrency: Annotated[str | None, typer.Option(metavar="N[,N...]", help="Closed loop: clients [8].")] = None,
    burstiness: Annotated[float, typer.Option(min=0.01, help="Of arrivals: 1 Poisson, less comes in bursts.")] = 1.0,
    requests: Annotated[int | None, typer.Option(min=1, help="Of each run [100; no limit with --duration].")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds after which nothing more is sent.")] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests ahead of the first run, not counted.")] = 8,
    load: Annotated[LoadName, typer.Option(help="What is asked.")] = "random",
    input_tokens: Annotated[str | None, typer.Option(metavar=RANGE, help="Of a message [512; shared: 64].")] = None,
    output_tokens: Annotated[str | None, typer.Option(metavar=RANGE, help="Of an answer [128].")] = None,
    file: Annotated[Path | None, typer.Option(help="sharegpt: its JSON, or lines of prompt, output_tokens.")] = None,
    max_context: Annotated[int | None, typer.Option(min=64, help="sharegpt: tokens at most [2048].")] = None,
    prefix_groups: Annotated[int | None, typer.Option(min=1, help="shared-prefix: how many [8].")] = None,
    prefix_tokens: Annotated[int | None, typer.Option(min=1, help="shared-prefix: how long [1024].")] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="shared-prefix: of a conversation [1].")] = None,
    seed: Annotated[int, typer.Option(help="The load is the same for every server.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    tokenize: Annotated[bool, typer.Option(help="Ask the server's /tokenize, so that lengths are exact.")] = True,
    slo: Annotated[str | None, typer.Option(metavar="ttft=MS,...", help="Goodput's: of ttft, tpot, e2e.")] = None,
    timeout: Annotated[float, typer.Option("--timeout-s", min=0.1, help="Of a request.")] = 600.0,
    json_file: Json = None,
    rows: Annotated[bool, typer.Option("--rows", help="With --json: every request, too.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw it there.")] = None,
) -> None:
    """Time a running server's answers, anybody's.

    Several rates, as 1,2,4,8, make a run each and one table. Ctrl-C shows what there is by then.
    """
    from .bench_flags import LoadFlags, make_load, make_paces
    from .bench_output import check_outputs, run_serve
    from .bench_report import Slo
    from .bench_serve import ServePlan

    check_outputs(json_file, plot, rows=rows)
    wanted = LoadFlags(input_tokens, output_tokens, file, max_context, prefix_groups, prefix_tokens, turns)
    plan = ServePlan(
        url=url,
        api_key=api_key,
        model=model,
        endpoint=endpoint,
        paces=make_paces(rate, concurrency, requests),
        burstiness=burstiness,
        requests=requests if requests is not None or duration is not None else 100,
        duration_s=duration,
        warmup=warmup,
        load=make_load(load, wanted),
        seed=seed,
        temperature=temperature,
        tokenize=tokenize,
        slo=None if slo is None else Slo.parse(slo),
        timeout_s=timeout,
    )
    raise typer.Exit(run_serve(plan, json_file=json_file, rows=rows, plot=plot))


@bench.command()
@with_flags(ENGINE_FLAGS)
def engine(
    model: Model = None,
    *,
    batch: Annotated[str, typer.Option(metavar="N[,N...]", help="Sequences that decode together.")] = "1,8,32",
    input_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt that is decoded from.")] = 32,
    output_tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 64,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt whose reading is timed.")] = 512,
    json_file: Json = None,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Time the engine alone: no HTTP, no text, no Ray."""
    from .bench_engine import EngineLoad, bench_engine
    from .bench_report import check_writable

    check_writable(json_file, "--json", ".json")
    load = EngineLoad(numbers(batch, "--batch"), input_tokens, output_tokens, prefill_tokens)
    bench_engine(model, overrides, load, json_file=json_file)


@bench.command()
def kernels(
    model: Model = None,
    *,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option()] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "bfloat16",
    kv_cache_dtype: Annotated[Literal["auto", "bfloat16", "int8", "fp8"], typer.Option()] = "auto",
    batch: Annotated[str, typer.Option(metavar="N[,N...]", help="Tokens of a decode step.")] = "1,32",
    context: Annotated[str, typer.Option(metavar="N[,N...]", help="Tokens that attention reads.")] = "512,2048",
    seconds: Annotated[float, typer.Option(min=0.001, help="Spent on each figure, at least.")] = 0.2,
    threads: Annotated[int | None, typer.Option(min=1, help="On a CPU; default: all cores.")] = None,
    json_file: Json = None,
) -> None:
    """Time each operation at a model's shapes.

    Against what memory and multipliers of this device can do. Weights are random: only the model's config is read.
    """
    from .bench_kernels import KernelPlan, bench_kernels
    from .bench_report import check_writable

    check_writable(json_file, "--json", ".json")
    batches, contexts = numbers(batch, "--batch"), numbers(context, "--context")
    plan = KernelPlan(device, dtype, batches, contexts, seconds, threads, kv_cache_dtype)
    bench_kernels(model, plan, json_file=json_file)


@bench.command()
@with_flags(START_FLAGS)
def startup(
    model: Model = None,
    *,
    runs: Annotated[int, typer.Option(min=1, help="Starts, one after the other.")] = 3,
    json_file: Json = None,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Time how `shoal serve` starts and ends.

    From the command to /health, to /ready and to a first token, and from SIGTERM to its end.
    """
    from .bench_report import check_writable
    from .bench_startup import bench_startup

    check_writable(json_file, "--json", ".json")
    bench_startup(model, overrides, runs=runs, json_file=json_file)


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """Of `1,8,32`. Raises ConfigError."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"{flag} {text}: expected whole numbers from 1 on, as 1,8,32")
    return found
