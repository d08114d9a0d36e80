"""The one place where the device decides what computes: `select_ops`. Called once per rank."""

from torch import device

from .ops import Ops


def select_ops(on: device) -> Ops:
    """The fastest `Ops` for this device. Imports only what that device needs."""
    match on.type:
        case "cuda":
            from .triton_ops import TritonOps

            return TritonOps(on)
        case "cpu":
            from .cpu import CpuOps

            return CpuOps(on)
        case other:
            raise ValueError(f"no kernels for device type {other!r}: use 'cuda' or 'cpu'")
