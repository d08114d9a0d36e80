"""The GPUs that `shoal plan` knows: what their data sheets say, and what they cost.

Memory is what CUDA reports as a device's whole, which is less than its name says. Rates are of dense matrices, from
NVIDIA's data sheets (for Blackwell its architecture brief, for the RTX 4090 Ada's white paper, sums in float32); the
network is what clouds put beside such a GPU. How much of all that is reached is `plan_costs.py`'s affair.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from ..runtime.errors import ConfigError

GIB = 1 << 30
PRICES_OF = "June 2025"
"""When the prices were typical on-demand ones of GPU clouds, in USD an hour. They move: `--price` says today's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One type of device, in the units of data sheets.

    gb_s: of its memory. tflops: of dense 16-bit products. tflops_8bit: of products of two 8-bit numbers, of the types
    in `types_8bit`. link_gb_s: each way to a GPU of the same node, link_us: what a message there takes besides.
    network_gb_s: to other nodes, a GPU's part. is_cpu: one device, which all ranks share.
    """

    name: str
    gib: float
    gb_s: float
    tflops: float
    tflops_8bit: float = 0.0
    types_8bit: frozenset[str] = frozenset()
    link_gb_s: float
    link_us: float
    network_gb_s: float
    usd_h: float
    is_cpu: bool = False

    @property
    def memory(self) -> int:
        return int(self.gib * GIB)


_NVLINK_US, _PCIE_US, _NETWORK_US = 2.0, 6.0, 15.0
_INT8, _BOTH = frozenset({"int8"}), frozenset({"int8", "fp8"})
_ROWS = (  # GiB, GB/s, TFLOP/s in 16 and in 8 bits and of what, link GB/s, network GB/s, USD an hour
    ("A100-40", 39.4, 1555, 312, 624, _INT8, 300, 25, 1.30),
    ("A100-80", 79.1, 2039, 312, 624, _INT8, 300, 25, 1.80),
    ("H100", 79.1, 3350, 989, 1979, _BOTH, 450, 50, 3.00),
    ("H200", 139.8, 4800, 989, 1979, _BOTH, 450, 50, 3.80),
    ("B200", 178.3, 8000, 2250, 4500, _BOTH, 900, 50, 5.50),
    ("L4", 22.0, 300, 121, 242, _BOTH, 25, 6.25, 0.70),
    ("L40S", 44.4, 864, 362, 733, _BOTH, 25, 12.5, 1.20),
    ("A10G", 22.0, 600, 70, 140, _INT8, 25, 6.25, 1.00),
    ("RTX-4090", 23.5, 1008, 165, 330, _BOTH, 20, 3.0, 0.50),
)
GPUS: dict[str, Gpu] = {
    name: Gpu(
        name=name,
        gib=gib,
        gb_s=gb_s,
        tflops=tflops,
        tflops_8bit=tflops_8bit,
        types_8bit=types,
        link_gb_s=link,
        link_us=_NVLINK_US if link >= 300 else _PCIE_US,
        network_gb_s=network,
        usd_h=usd_h,
    )
    for name, gib, gb_s, tflops, tflops_8bit, types, link, network, usd_h in _ROWS
}
CPU = "cpu"
NETWORK_S = 1e-6 * _NETWORK_US
NO_FP8_CACHE = frozenset({"A100-40", "A100-80", "A10G"})  # compute capability below 8.9
_ALIASES = {"A100": "A100-80", "H100-80": "H100", "RTX4090": "RTX-4090", "4090": "RTX-4090"}
_UNSUPPORTED = {"MI300X": "our kernels and collectives are made for CUDA, and none was run on ROCm"}


@dataclass(frozen=True, slots=True)
class Pool:
    """So many devices of one type."""

    gpu: Gpu
    count: int


def find_gpu(name: str) -> Gpu:
    """By name, in any case. Raises ConfigError: it is not in the table; with the nearest one that is."""
    known = {key.upper(): key for key in (*GPUS, CPU)} | _ALIASES
    wanted = name.strip().upper().replace(" ", "-").replace("_", "-")
    if wanted in known:
        return _this_cpu() if known[wanted] == CPU else GPUS[known[wanted]]
    if wanted in _UNSUPPORTED:
        raise ConfigError(f"--gpu {name}: not supported: {_UNSUPPORTED[wanted]}")
    near = get_close_matches(wanted, known, n=1)
    hint = f"; did you mean {known[near[0]]}?" if near else ""
    raise ConfigError(f"--gpu {name}: not in the table ({', '.join((*GPUS, CPU))}){hint}")


def parse_pools(text: str, count: int | None) -> tuple[Pool, ...]:
    """`H200` with --count, or `H100:4,A100:4`. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and ":" not in text:
        return (Pool(find_gpu(text), _counted(1 if count is None else count, "--count")),)
    if count is not None:
        raise ConfigError(f"--count {count}: --gpu {text} says how many there are of each type; leave --count out")
    pools = []
    for part in parts:
        name, colon, number = part.rpartition(":")
        if not colon or not number.isdigit():
            raise ConfigError(f"--gpu {text}: expected TYPE, or TYPE:COUNT for each type, as H100:4,A100:4")
        pools.append(Pool(find_gpu(name), _counted(int(number), f"--gpu {name}")))
    if len({pool.gpu.name for pool in pools}) < len(pools):
        raise ConfigError(f"--gpu {text}: name each type once")
    if len(pools) > 1 and any(pool.gpu.is_cpu for pool in pools):
        raise ConfigError(f"--gpu {text}: the ranks of a replica are all on GPUs or all on CPUs")
    return tuple(pools)


def with_price(pools: Sequence[Pool], price: float | None) -> tuple[Pool, ...]:
    """The pools at this price a device and hour; None: the table's."""
    return tuple(pools) if price is None else tuple(replace(p, gpu=replace(p.gpu, usd_h=price)) for p in pools)


def _counted(count: int, flag: str) -> int:
    if not 1 <= count <= 1024:
        raise ConfigError(f"{flag}: {count} devices; possible are 1 to 1024")
    return count


def _this_cpu() -> Gpu:
    """This machine, by guess, for each core: 18 GB/s, and 0.25 TFLOP/s in bfloat16. `--calibrate` knows better."""
    cores = os.cpu_count() or 1
    return Gpu(
        name=CPU,
        gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
        gb_s=18.0 * cores,
        tflops=0.25 * cores,
        link_gb_s=8.0,
        link_us=4.0,
        network_gb_s=1.25,
        usd_h=0.0,
        is_cpu=True,
    )
