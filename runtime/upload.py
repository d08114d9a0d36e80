"""Takes a step's inputs to the device: a dozen small tensors, one behind the other, in one copy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .batch import StepBatch

ALIGN = 16  # bytes: what kernels assume of an address

Upload = Callable[[StepBatch], StepBatch]
"""A batch in the host's memory -> the same on the device."""


def as_it_is(batch: StepBatch) -> StepBatch:
    """Of a rank that computes in the host's memory."""
    return batch


def select_upload(device: torch.device) -> Upload:
    """What takes batches to this device."""
    return as_it_is if device.type == "cpu" else PackedUpload(device)


class Staging:
    """Memory of the host that a device reads by itself, filled anew each step once the last one has been read."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        # None: a CPU's copy is made when the call returns.
        self._was_read = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until what was sent last may be overwritten."""
        if self._was_read is not None:
            self._was_read.synchronize()

    def send(self, to: Tensor) -> None:
        """Copy the first bytes to a device tensor of as many; does not wait."""
        to.copy_(self.bytes[: to.shape[0]], non_blocking=True)
        if self._was_read is not None:
            self._was_read.record()


class PackedUpload:
    """An `Upload` in one copy, into fresh memory of the device."""

    def __init__(self, device: torch.device, *, num_bytes: int = 1 << 16) -> None:
        """num_bytes: to begin with; a larger batch gets more."""
        self._device = device
        self._staging = Staging(num_bytes, device)

    def __call__(self, batch: StepBatch) -> StepBatch:
        tensors = [*tensors_of(batch), batch.attention.block_table_SP]
        starts, total = lay_out(tensors)
        self._staging.wait()
        if total > self._staging.bytes.shape[0]:
            self._staging = Staging(2 * total, self._device)
        for start, tensor in zip(starts, tensors, strict=True):
            carve(self._staging.bytes, start, tensor).copy_(tensor)
        flat = torch.empty(total, dtype=torch.uint8, device=self._device)
        self._staging.send(flat)
        *sent, table_SP = [carve(flat, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
        return with_tensors(batch, sent, block_table_SP=table_SP)


def lay_out(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """(the byte of a flat buffer at which each begins, bytes in all)."""
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.nbytes // ALIGN) * ALIGN
    return starts, total


def carve(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """Memory from a byte of a flat buffer on, seen as a tensor of this shape and dtype."""
    return flat[start : start + like.nbytes].view(like.dtype).view(like.shape)


def tensors_of(batch: StepBatch) -> list[Tensor]:
    """All tensors of a batch but its block table, in the order of `with_tensors`."""
    attention, sampling = batch.attention, batch.sampling
    return [
        batch.token_ids_T,
        batch.positions_T,
        batch.kv_slots_T,
        batch.seq_slots_T,
        batch.rows_R,
        attention.query_start_S1,
        attention.kv_lens_S,
        sampling.temperature_R,
        sampling.top_k_R,
        sampling.top_p_R,
        sampling.min_p_R,
        sampling.seed_R,
        sampling.position_R,
    ]


def with_tensors(batch: StepBatch, tensors: Sequence[Tensor], *, block_table_SP: Tensor) -> StepBatch:
    """The batch with other tensors in the places of its own."""
    token_ids, positions, kv_slots, seq_slots, rows, starts, lens, *sampling = tensors
    temperature, top_k, top_p, min_p, seed, position = sampling
    return replace(
        batch,
        token_ids_T=token_ids,
        positions_T=positions,
        kv_slots_T=kv_slots,
        seq_slots_T=seq_slots,
        rows_R=rows,
        attention=replace(batch.attention, query_start_S1=starts, kv_lens_S=lens, block_table_SP=block_table_SP),
        sampling=replace(
            batch.sampling,
            temperature_R=temperature,
            top_k_R=top_k,
            top_p_R=top_p,
            min_p_R=min_p,
            seed_R=seed,
            position_R=position,
        ),
    )
