"""The memory plan and the cache it is made for."""

import pytest
import torch
from transformers import AutoConfig

from shoal.parallel.grid import Grid
from shoal.runtime import kv
from shoal.runtime.config import EngineConfig
from shoal.runtime.errors import ConfigError, MemoryPlanError
from shoal.runtime.memory import GIB, MemoryPlan, plan_memory
from shoal.runtime.models.spec import ModelSpec
from shoal.runtime.share import Share, deal

from ..models.support import TINY

MAX_LEN = 512


@pytest.fixture(scope="module")
def share() -> Share:
    sizes = TINY | {"max_position_embeddings": MAX_LEN, "head_dim": 64, "num_hidden_layers": 3}
    spec = ModelSpec.from_config(AutoConfig.for_model("llama", **sizes).to_dict())
    return deal(spec, Grid())[0]


def plan(share: Share, kv_cache_dtype: str, *, free: int = 1 << 40, weight_bytes: int | None = None) -> MemoryPlan:
    config = EngineConfig(
        model="m",
        device="cpu",
        kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type]
        kv_cache_memory_gb=0.01,
        max_num_seqs=4096,
    )
    return plan_memory(share, config, max_model_len=MAX_LEN, dtype=torch.bfloat16, free=free, weight_bytes=weight_bytes)


@pytest.mark.parametrize(
    ("name", "dtype", "per_head"),
    [
        ("auto", torch.bfloat16, 128),
        ("bfloat16", torch.bfloat16, 128),
        ("int8", torch.int8, 68),
        ("fp8", torch.float8_e4m3fn, 68),
    ],
)
def test_the_plan_counts_what_is_allocated(share: Share, name: str, dtype: torch.dtype, per_head: int) -> None:
    memory = plan(share, name)
    assert memory.kv_bytes // memory.kv_tokens == 3 * 2 * share.kv_shape[0] * per_head
    assert str(dtype).removeprefix("torch.") in memory.describe()
    layers = kv.allocate(share, num_blocks=7, block_size=32, dtype=memory.kv_dtype, device=torch.device("cpu"))
    assert len(layers) == 3
    tensors = [t for c in layers for t in (c.k_NKBE, c.v_NKBE, c.k_scale_NKB, c.v_scale_NKB) if t is not None]
    assert {t.dtype for t in tensors} == {dtype, torch.float32 if per_head == 68 else dtype}
    assert sum(t.nbytes for t in tensors) == memory.kv_bytes // memory.num_blocks * 7
    assert all((t.float() == 0).all() for t in tensors)


def test_auto_is_the_models_dtype() -> None:
    assert kv.cache_dtype(EngineConfig(model="m"), torch.float16) is torch.float16


def test_packed_weights_leave_more_for_the_cache(share: Share) -> None:
    dense = plan(share, "auto")
    with pytest.raises(MemoryPlanError, match="are free"):
        plan(share, "auto", free=dense.workspace_bytes + dense.weight_bytes // 2)
    packed = plan(share, "auto", free=2 * GIB, weight_bytes=dense.weight_bytes // 4)
    assert packed.weight_bytes == dense.weight_bytes // 4


def test_fp8_is_refused_where_the_gpu_has_none(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8.*8\.0.*8\.9.*int8"):
        kv.allocate(share, num_blocks=1, block_size=16, dtype=torch.float8_e4m3fn, device=torch.device("cuda"))
