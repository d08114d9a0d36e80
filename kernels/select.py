"""The one place where the device decides what computes: `select_ops`. Called once a rank."""

from threading import Thread

from torch import device

from .ops import Ops


def prepare_ops(on: device) -> None:
    """Begin in the background what `select_ops` waits for at a machine's first start: compiling the CPU kernels."""
    if on.type == "cpu":
        from .native import load_native

        Thread(target=load_native, name="shoal-compile", daemon=True).start()


def select_ops(on: device, *, deterministic: bool = False) -> Ops:
    """The fastest `Ops` for this device; or, deterministic, the fastest in which a row's bits are its own affair.

    Imports only what that device needs.
    """
    match on.type, deterministic:
        case "cuda", _:
            from .triton_ops import TritonOps

            return TritonOps(on, deterministic=deterministic)
        case "cpu", False:
            from .cpu import CpuOps
            from .cpu_native import NativeCpuOps
            from .native import load_native

            native = load_native()
            return CpuOps(on) if native is None else NativeCpuOps(on, native)
        case "cpu", True:
            from .deterministic import DeterministicCpuOps

            return DeterministicCpuOps(on)
        case other, _:
            raise ValueError(f"no kernels for device type {other!r}: use 'cuda' or 'cpu'")
