"""The command line, `shoal`. Heavy things (torch, transformers, ray) are imported by the command that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.errors import ConfigError, ShoalError, StartupError
from .bench import bench
from .cli_config import config
from .cli_drain import drain_node
from .cli_ray_up import ray_up
from .config import flag_of
from .flags import (
    AUTOSCALE_SIMULATION,
    ENGINE_FLAGS,
    MODEL_HELP,
    SERVE_FLAGS,
    SIMULATION,
    ConfigFile,
    MaybeModel,
    section_fields,
    with_flags,
)
from .plan_command import plan
from .processes import Stop

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

CHAT_FLAGS = [*ENGINE_FLAGS, ("router", "chat_template")]
DEMO_FLAGS = [
    *ENGINE_FLAGS,
    *[("server", name) for name in ("host", "port", "allow_anonymous", "haproxy", "redis_url")],
]

app = typer.Typer(
    name="shoal",
    help="A distributed LLM serving runtime on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Url = Annotated[str | None, typer.Option("--url", help="A running server, http://host:port, instead of a model here.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
Key = Annotated[str | None, typer.Option("--api-key", help="Sent to the server at --url.")]


@app.command()
@with_flags(SERVE_FLAGS)
def serve(
    model: MaybeModel = None,
    *,
    config: ConfigFile = None,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Serve a model over HTTP with OpenAI's API.

    Until Ctrl-C or SIGTERM. Every flag is a key of shoal.yaml, too: --max-model-len is engine.max_model_len.
    """
    if model is not None:
        overrides["engine", "model"] = model
    from .config import load_config
    from .preflight import HERE
    from .serve import serve_forever

    raise typer.Exit(serve_forever(load_config(overrides, file=config, checks=HERE)))


@app.command()
@with_flags(SERVE_FLAGS)
def deploy(
    model: MaybeModel = None,
    *,
    config: ConfigFile = None,
    address: Annotated[str, typer.Option(help="Of the cluster: its Ray dashboard.")] = "http://127.0.0.1:8265",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    wait: Annotated[bool, typer.Option(help="Until it serves.")] = True,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Serve a model on a running cluster, or change what it serves.

    What can change in place does, under running answers; the rest is replaced, or added beside.
    """
    if model is not None:
        overrides["engine", "model"] = model
    from .config import load_config
    from .deploy import run_deploy
    from .preflight import grid_problems
    from .serve_config import deployed

    loaded = load_config(overrides, file=config, checks=(deployed, grid_problems))
    run_deploy(loaded, address=address, dry_run=dry_run, wait=wait)


@app.command()
@with_flags(DEMO_FLAGS)
def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="Exit after the answer.")] = False,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Serve the demo model and ask it a question."""
    from .demo import run_demo

    raise typer.Exit(run_demo(overrides, once=once))


@app.command()
@with_flags(ENGINE_FLAGS)
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more.")],
    *,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Complete prompts, without a server."""
    from .offline import run_generate

    run_generate(model, prompts, overrides, max_tokens=max_tokens, temperature=temperature)


@app.command()
@with_flags(CHAT_FLAGS)
def chat(
    model: MaybeModel = None,
    *,
    url: Url = None,
    api_key: Key = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Talk with a model here, or on a server (--url)."""
    from .offline import chat_with_model, chat_with_server

    if url is not None:
        _refuse_flags(overrides, url)
        chat_with_server(url, model, api_key=api_key, max_tokens=max_tokens, temperature=temperature)
    elif model is not None:
        chat_with_model(model, overrides, max_tokens=max_tokens, temperature=temperature)
    else:
        raise ConfigError("name a model, or a server with --url http://127.0.0.1:8000")


@app.command()
def doctor(
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port you mean to serve on.")] = 8000,
) -> None:
    """Look for what this machine lacks."""
    from .doctor import run_doctor

    raise typer.Exit(run_doctor(port))


@app.command()
def quantize(
    model: Model,
    *,
    format: Annotated[str, typer.Option("--format", help="int8, w8a8, fp8 or int4.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: a new one.")],
    group_size: Annotated[int | None, typer.Option(help="Of int4. Default: 128, or 64 or 32 where that fits.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Of int4: zero points. Default: with them.")
    ] = None,
    calibration: Annotated[Path | None, typer.Option(help="A text to go by. Default: one that comes along.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="A module to leave dense, or re:EXPRESSION; may be repeated.")
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Hold the result against the original.")] = True,
    report: Annotated[Path | None, typer.Option(help="Write the report there, too, as JSON.")] = None,
) -> None:
    """Write a quantised copy of a model, as compressed-tensors.

    What is written is served by shoal, in the layouts that vLLM takes, and read by transformers; of int4 with
    --symmetric alone.
    """
    from ..runtime.quantize import HEAD, Recipe
    from .quantize import run_quantize

    recipe = Recipe(format, group_size=group_size, symmetric=symmetric, ignore=(HEAD, *(ignore or ())))
    run_quantize(model, out, recipe, calibration=calibration, evaluation=evaluate, report=report)


@app.command()
def perplexity(
    model: Model,
    other: Annotated[str | None, typer.Argument(metavar="OTHER", help="Hold this one against it.")] = None,
    *,
    text: Annotated[Path | None, typer.Option(help="A text. Default: one that comes along.")] = None,
) -> None:
    """Measure how well a model predicts a text."""
    from .quantize import run_perplexity

    run_perplexity(model, other, text=text)


@app.command()
@with_flags(section_fields(SIMULATION))
def simulate(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Compare balancers over many replicas on a virtual clock.

    Real schedulers, block pools, prefix index and balancers; step times from a cost model, tokens from a script.
    """
    from .simulate import run_simulation

    run_simulation({name: value for (_, name), value in overrides.items()}, as_json=as_json)


@app.command("simulate-autoscaling")
@with_flags(section_fields(AUTOSCALE_SIMULATION))
def simulate_autoscaling(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overrides: dict[tuple[str, str], Any],
) -> None:
    """Compare autoscaling policies over traces of requests on a virtual clock.

    Late first tokens and GPU hours, of ours and of Ray Serve's own. Real schedulers, balancers and policies; step times
    from a cost model.
    """
    from .sim_autoscale import run_autoscale_simulation

    run_autoscale_simulation({name: value for (_, name), value in overrides.items()}, as_json=as_json)


app.command()(plan)
app.command()(drain_node)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("shoal"))


app.add_typer(bench, name="bench")
app.add_typer(config, name="config")
app.add_typer(ray_up, name="ray-up")

keys = typer.Typer(help="API keys and whose they are.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(keys, name="keys")
Named = Annotated[str, typer.Option("--tenant", help="Whose key it is: a name for metrics and logs.")]
TenantPriority = Annotated[int | None, typer.Option("--priority", help="Lower goes first.")]
Weight = Annotated[float | None, typer.Option("--weight", help="Its share against others'.")]
PerMinute = Annotated[float | None, typer.Option("--requests-per-minute", help="More are refused (429).")]
TokensPerMinute = Annotated[float | None, typer.Option("--tokens-per-minute", help="More are refused (429).")]
Budget = Annotated[int | None, typer.Option("--token-budget", help="Tokens a day.")]
RedisUrl = Annotated[str, typer.Option("--redis-url", help="The servers' Redis.")]


@keys.command("new")
def keys_new(
    *,
    tenant: Named,
    priority: TenantPriority = None,
    weight: Weight = None,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    token_budget: Budget = None,
    redis_url: Annotated[str | None, typer.Option(help="Store it there as well, instead of in a config.")] = None,
    days: Annotated[float, typer.Option(min=0.001, max=36_500, help="With --redis-url: it ends after these.")] = 3650,
    config: ConfigFile = None,
) -> None:
    """Make a key. It is shown once; what is to be kept is its digest."""
    from .keys import config_line, new_key, put_key, secret_of, tenant_config

    owner = tenant_config(
        {
            "name": tenant,
            "priority": priority,
            "weight": weight,
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
            "token_budget": token_budget,
        }
    )
    key = new_key()
    if redis_url is not None:
        put_key(redis_url, key, owner, secret=secret_of(config), days=days)
        print(f"the key of {tenant}, stored for {days:g} days:", file=sys.stderr)
    print(key)
    if redis_url is None:
        print(f"under router.tenants of shoal.yaml:\n{config_line(owner, key)}", file=sys.stderr)


@keys.command("delete")
def keys_delete(*, redis_url: RedisUrl, config: ConfigFile = None) -> None:
    """Delete a stored key, which is read from the standard input: a command line would show it."""
    from .keys import delete_key, secret_of

    delete_key(redis_url, sys.stdin.readline().strip(), secret=secret_of(config))


@keys.command("put")
def keys_put(
    *,
    tenant: Named,
    redis_url: RedisUrl,
    days: Annotated[float, typer.Option(min=0.001, max=36_500, help="It ends after these.")] = 3650,
    config: ConfigFile = None,
) -> None:
    """Store a key that is read from the standard input, for a tenant whose limits the servers' config has."""
    from .keys import put_key, secret_of, tenant_config

    key = sys.stdin.readline().strip()
    if len(key) < 16:
        raise ConfigError(f"the key on the standard input has {len(key)} characters; at least 16 are needed")
    put_key(redis_url, key, tenant_config({"name": tenant}), secret=secret_of(config), days=days)


def _refuse_flags(overrides: dict[tuple[str, str], Any], url: str) -> None:
    """Nothing is ignored in silence."""
    if overrides:
        flags = ", ".join(flag_of(name) for _, name in overrides)
        raise ConfigError(f"{flags}: the server at {url} was told when it was started")


def main() -> None:
    """The `shoal` command. Exit codes: 0 done, 1 failed, 2 refused (usage, config, weights), 130 interrupted."""
    try:
        app()
    except StartupError as error:
        print(f"shoal: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Stop as stop:
        sys.exit(128 + stop.signum)  # before the service was ready; afterwards a signal is a clean end
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
