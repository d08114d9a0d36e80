"""The pipeline axis inside a node: the two ends of a rank in the ring of stages, over lines in shared memory."""

import time
from typing import Protocol

import torch
from torch import Tensor

from .shm_line import LineReader, LineWriter
from .station import COMPUTE, Station
from .tensors import as_bytes


class Outlet(Protocol):
    """What a `Ring` sends into."""

    def send(self, x: Tensor) -> None: ...


class Inlet(Protocol):
    """What a `Ring` receives from."""

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class Joined:
    """A `Ring` of two ends, which may go over different wires: the stage before on this node, the next on another."""

    def __init__(self, inlet: Inlet, outlet: Outlet, station: Station) -> None:
        self._inlet = inlet
        self._outlet = outlet
        self._station = station

    def send(self, x: Tensor) -> None:
        self._station.at("send")
        self._outlet.send(x)
        self._station.at(COMPUTE)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._station.at("receive")
        began = time.perf_counter()
        x = self._inlet.receive(shape, dtype)
        self._station.waited(began)
        self._station.at(COMPUTE)
        return x


class NoRing:
    """The ring of a stage that has no others: nothing is sent or received."""

    def send(self, x: Tensor) -> None:
        raise AssertionError("a single stage has no next one")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        raise AssertionError("a single stage has none before it")


class SharedMemoryOutlet:
    """Tensors into a line."""

    def __init__(self, line: LineWriter) -> None:
        self._line = line

    def send(self, x: Tensor) -> None:
        self._line.send(as_bytes(x.contiguous()).numpy().data)


class SharedMemoryInlet:
    """Tensors out of a line."""

    def __init__(self, line: LineReader) -> None:
        self._line = line

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty(shape, dtype=dtype)
        self._line.receive_into(as_bytes(x).numpy().data)
        return x
