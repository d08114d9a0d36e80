"""What the router is told: a frozen value, read once when it is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..runtime.generation import MAX_N


def _check_key(key: str) -> str:
    """What a header can carry. Nobody could send an empty one: it comes of a variable that is not set."""
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("an API key is not empty and has neither spaces nor characters beyond ASCII")
    return key


class RouterConfig(BaseModel):
    """One ingress. What is over a limit is a 4xx that names the value, the limit and the field below."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    served_model_name: tuple[str, ...] = Field(
        (), description="Names clients may ask for, the first one is listed first; default: the model's own name."
    )
    api_keys: tuple[Annotated[str, AfterValidator(_check_key)], ...] = Field(
        (), repr=False, description="Keys that open the API; without one no key is asked for."
    )
    chat_template: Path | None = Field(
        None, description="A file with a Jinja template for conversations; default: the model's own."
    )
    secret: str | None = Field(
        None, repr=False, description="Makes the salts of tenants; default: drawn at start, one for each process."
    )
    max_in_flight: int = Field(1024, ge=1, description="Generations admitted and unfinished; more are refused (429).")
    max_body_bytes: int = Field(8 * 2**20, ge=1024, le=2**28, description="Longest request body; over it: 413.")
    max_header_bytes: int = Field(16 * 2**10, ge=1024, description="Names and values of all headers together.")
    max_headers: int = Field(100, ge=8, description="Headers in a request.")
    max_nesting: int = Field(64, ge=8, le=200, description="Depth of arrays and objects in a body.")
    max_messages: int = Field(2048, ge=1, description="Messages in a chat.")
    max_prompts: int = Field(512, ge=1, description="Prompts in one completions request.")
    max_n: int = Field(MAX_N, ge=1, le=MAX_N, description="Choices per prompt.")
    max_choices: int = Field(1024, ge=1, description="Prompts x n of one request.")
    max_total_tokens: int = Field(4 * 2**20, ge=1, description="Prompts x n x max_tokens of one request.")
    default_timeout_s: float = Field(600.0, gt=0, description="Deadline of a request that names none.")
    max_timeout_s: float = Field(3600.0, gt=0, description="Longest deadline a request may name (its `timeout`).")
    body_timeout_s: float = Field(30.0, gt=0, description="A body must be complete in this time; else 408.")
    send_timeout_s: float = Field(60.0, gt=0, description="A client that takes nothing for so long is given up.")
    ready_timeout_s: float = Field(1.0, gt=0, description="Replicas must say where they listen in this time.")
