"""What one engine is told: a frozen value, read once when it is built."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..parallel.grid import Grid


class EngineConfig(BaseModel):
    """One replica's engine. Field names are the flags' (`--max-model-len`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="A folder, a hub id already in the local cache, or a .gguf file.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Of activations and unquantised weights; auto: the checkpoint's (bfloat16 for GGUF, "
        "and on CPUs for float16).",
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: cuda where there is one, else cpu.")
    max_model_len: int | None = Field(
        None, ge=8, description="Longest prompt + output, in tokens; default: the model's own."
    )
    tensor_parallel_size: int = Field(1, ge=1, description="Ranks that share each layer.")
    pipeline_parallel_size: int = Field(1, ge=1, description="Stages the layers are cut into.")
    pp_layers: tuple[int, ...] | None = Field(
        None, description="Layers of each stage, as 8,8,7,7; default: stages of equal cost."
    )
    pp_schedule: Literal["ring", "gpipe"] = Field(
        "ring", description="ring: every stage always has work; gpipe: fill, drain, repeat (to measure against)."
    )
    micro_batches: int | None = Field(
        None, ge=1, le=64, description="Micro-batches between two barriers of gpipe; default: as many as stages."
    )
    block_size: int = Field(32, ge=16, le=256, description="Tokens in a KV block (a page); a power of two.")
    kv_cache_dtype: Literal["auto", "bfloat16", "int8", "fp8"] = Field(
        "auto",
        description="Of keys and values in the cache; int8, fp8: half of bfloat16's bytes, a scale for each token and "
        "head; auto: the model's.",
    )
    kv_cache_memory_gb: float | None = Field(
        None,
        gt=0,
        description="GiB a rank for KV blocks; default: the rest of gpu_memory_utilization, or 2 / ranks on a CPU.",
    )
    gpu_memory_utilization: float = Field(0.90, gt=0, le=1, description="Share of the GPU's memory the engine may use.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Sequences that run at once.")
    max_num_batched_tokens: int = Field(2048, ge=16, description="Token budget of one step.")
    max_queued: int = Field(1024, ge=0, description="Generations that may wait; more are refused with 429.")
    enable_prefix_caching: bool = Field(True, description="Share KV blocks between requests with equal prefixes.")
    scheduling_policy: Literal["fcfs", "priority", "fair"] = Field(
        "fcfs", description="Who is next, who is preempted; fair: by priority, then in turns between tenants."
    )
    speculative_model: str | None = Field(
        None,
        description="Guesses tokens, so that a step may say several; answers stay the same. ngram: what followed the "
        "same words before; or a smaller model of the same vocabulary: a folder, a hub id or a .gguf file.",
    )
    num_speculative_tokens: int = Field(4, ge=1, le=16, description="Guesses a sequence and step, at most.")
    speculative_max_batch: int = Field(
        4, ge=1, description="Nobody is guessed at while more sequences run: then steps have enough to compute."
    )
    deterministic: bool = Field(
        False, description="One reduction order for every batch size: continuations equal the undisturbed run."
    )
    enforce_eager: bool = Field(
        False, description="Launch every kernel each step; else decode steps on a GPU replay captured CUDA graphs."
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads a rank; default: cores / ranks on the node.")
    step_timeout_s: float = Field(
        8.0, gt=0, description="Seconds without progress after which a rank counts as hung; its group restarts."
    )
    start_timeout_s: float = Field(900.0, gt=0, description="Seconds the ranks may take to load and come up.")
    seed: int | None = Field(None, description="Seeds the seeds of requests that bring none; default: entropy.")

    @property
    def grid(self) -> Grid:
        return Grid(self.tensor_parallel_size, self.pipeline_parallel_size)

    @field_validator("block_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value.bit_count() != 1:
            raise ValueError("must be a power of two: 16, 32, 64, 128 or 256")
        return value

    @field_validator("pp_layers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`8,8,7,7`, as a flag gives it."""
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return ",".join(texts).split(",")
        return value
