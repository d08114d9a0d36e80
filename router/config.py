"""What the router is told: a frozen value, read once when it is built."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..runtime.generation import MAX_N
from ..runtime.misfit import Misfit

_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_key(key: str) -> str:
    """What a header can carry. Nobody could send an empty one: it comes of a variable that is not set."""
    if not re.fullmatch("[!-~]+", key):
        raise ValueError("an API key is not empty and has neither spaces nor characters beyond ASCII")
    return key


def _check_name(name: str) -> str:
    if name == "anonymous" or re.fullmatch(r"key-[0-9]+", name):
        raise ValueError("anonymous and key-1, key-2, ... are the names of who comes without a tenant's key")
    return name


class TenantConfig(BaseModel):
    """One owner of keys. `shoal keys new` makes a key and the digest to write down here."""

    model_config = _STRICT

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", description="In metrics and logs."
    )
    keys: tuple[Annotated[str, Field(pattern="^sha256:[0-9a-f]{64}$")], ...] = Field(
        (), repr=False, description="SHA-256 digests of its API keys, `sha256:` and 64 hexadecimal digits."
    )
    priority: int = Field(0, ge=-100, le=100, description="Lower goes first.")
    weight: float = Field(1.0, gt=0, le=1000, description="Its share of the service while others wait, too.")
    requests_per_minute: float | None = Field(None, gt=0, description="More are refused (429).")
    tokens_per_minute: float | None = Field(None, gt=0, description="Prompt and answer; more are refused (429).")
    token_budget: int | None = Field(None, ge=1, description="Tokens in all over `budget_s` seconds.")
    budget_s: float = Field(86_400.0, gt=0, description="After so long a budget is whole again.")
    max_in_flight: int | None = Field(None, ge=1, description="Its generations admitted and unfinished.")
    shares_cache: bool = Field(False, description="Reads and fills the cache that all such tenants share.")


class Rung(BaseModel):
    """One rung of the ladder that is climbed as load grows. Each holds from its load on, all below it too."""

    model_config = _STRICT

    load: float = Field(gt=0, description="Generations in flight or waiting, as a share of max_in_flight.")
    max_tokens: int | None = Field(None, ge=1, description="Answers are cut to so many tokens.")
    truncate_to: int | None = Field(
        None, ge=1, description="Prompts of requests that say `truncation: auto` keep their last so many tokens."
    )
    model: str | None = Field(None, description="Requests go to this smaller model (its served name).")
    shed: bool = Field(False, description="Requests of tenants with priority 0 or more are refused (503).")

    @model_validator(mode="after")
    def _gives_something_up(self) -> Rung:
        if not (self.max_tokens or self.truncate_to or self.model or self.shed):
            raise ValueError("a rung of the ladder gives something up: max_tokens, truncate_to, model or shed")
        return self


class RouterConfig(BaseModel):
    """One ingress. What is over a limit is a 4xx that names the value, the limit and the field below."""

    model_config = _STRICT

    served_model_name: tuple[str, ...] = Field(
        (), description="Names clients may ask for, the first one is listed first; default: the model's own name."
    )
    api_keys: tuple[Annotated[str, AfterValidator(check_key)], ...] = Field(
        (), repr=False, description="Keys that open the API, or their digests; without one no key is asked for."
    )
    api_key_file: Path | None = Field(
        None, description="A file with one key, or its digest, a line; at this place on every node with an ingress."
    )
    chat_template: Path | None = Field(
        None, description="A file with a Jinja template for conversations; default: the model's own."
    )
    secret: str | None = Field(
        None,
        min_length=32,
        repr=False,
        description="Makes the salts of tenants; default: drawn at start, one for each process.",
    )
    secret_file: Path | None = Field(None, description="A file with it instead, at this place on every node.")
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
    balancer: Literal["prefix", "p2c", "round-robin", "least-loaded"] = Field(
        "prefix", description="Which replica: by cached prefix and load, the better of two drawn, in turn, or by load."
    )
    ready_timeout_s: float = Field(1.0, gt=0, description="Replicas must say where they listen in this time.")

    tenants: tuple[TenantConfig, ...] = Field((), repr=False, description="Who has which keys, and what they may use.")
    ladder: tuple[Rung, ...] = Field((), description="What is given up as load grows, lowest load first.")
    max_waiting: int = Field(1024, ge=0, description="Generations that wait for a place among max_in_flight.")
    max_wait_s: float = Field(30.0, gt=0, description="Longest wait for a place; then 503.")

    cache_mode: Literal["reproducible", "all", "off"] = Field(
        "reproducible", description="What is cached: answers at temperature 0 or with a seed, all answers, or none."
    )
    cache_ttl_s: float = Field(3600.0, gt=0, description="How long a cached answer is used.")
    cache_max_bytes: int = Field(2**20, ge=1024, le=2**26, description="Longer logs, compressed, are not stored.")
    flight_lease_s: float = Field(3.0, gt=0.1, description="A leading ingress silent for so long is replaced.")
    flight_keep_s: float = Field(300.0, gt=0, description="How long an unfinished log can be continued.")
    redis_timeout_s: float = Field(0.05, gt=0, le=5, description="For one answer of Redis.")

    resume_attempts: int = Field(3, ge=0, description="Replicas that may be lost under one generation; 0: none.")
    resume_wait_s: float = Field(
        30.0, ge=0, description="How long a log waits for a replica that can continue it, or for Redis, which keeps it."
    )

    vllm_metrics: bool = Field(False, description="Serve the metrics that dashboards use under vLLM's names, too.")
    log_prompts: bool = Field(False, description="Write prompts and answers to the request log.")

    @property
    def has_keys(self) -> bool:
        """Whether somebody is kept out."""
        return bool(self.api_keys or self.tenants or self.api_key_file)

    @model_validator(mode="after")
    def _check(self) -> RouterConfig:
        loads = [rung.load for rung in self.ladder]
        for i, (below, load) in enumerate(pairwise(loads), 1):
            if load <= below:
                sentence = f"the ladder's loads are {loads}: each rung stands higher than the one before"
                raise Misfit(sentence, "ladder", i, "load")
        names = [tenant.name for tenant in self.tenants]
        owners: dict[str, str] = {digest_of(key): "api_keys" for key in self.api_keys}
        for i, tenant in enumerate(self.tenants):
            if tenant.name in names[:i]:
                raise Misfit(f"two tenants have the name {tenant.name}", "tenants", i, "name")
            for j, key in enumerate(tenant.keys):
                if owners.setdefault(key, tenant.name) != tenant.name:
                    sentence = f"one key belongs to both {owners[key]} and {tenant.name}"
                    raise Misfit(sentence, "tenants", i, "keys", j)
        return self


def digest_of(key: str) -> str:
    """`sha256:` and hexadecimal digits; of a digest itself."""
    is_digest = re.fullmatch("sha256:[0-9a-f]{64}", key)
    return key if is_digest else "sha256:" + hashlib.sha256(key.encode()).hexdigest()
