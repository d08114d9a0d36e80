"""`GraphRunner`: decode steps as captured CUDA graphs, one launch a step; all else goes through the `EagerRunner`.

A graph is recorded once for each of a few numbers of rows (`graph_sizes`), with everything of the step inside that the
rank computes: embedding, layers, logits, draw. It reads from fixed memory, into which a step's inputs go in one copy,
and writes to fixed memory. A batch takes the next larger graph; the rows too many are sequences of no tokens that
store nothing and that nobody reads. One graph serves every way of sampling: rows that filter nothing leave the
filters' kernel at once.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.ops import AttentionBatch, KVLayer, SamplingBatch
from .ahead import AllKnown, Recall
from .batch import StepBatch
from .errors import StartupError
from .models.decoder import Decoder, Step
from .progress import Progress
from .runner import EagerRunner
from .upload import Staging, carve, lay_out, tensors_of, with_tensors

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function launches and returns what launches the same again. The function is called at least once."""

Draw = Callable[[Tensor, SamplingBatch], Tensor]
"""`Ops.sample`, of a rank that holds the vocabulary alone."""

# Beside its share of the common memory: nodes, kernels' parameters. Of a model of some dozens of layers.
BYTES_A_GRAPH = 8 << 20


def graph_sizes(most: int) -> list[int]:
    """Rows of the graphs for batches of up to `most`: 1, 2, 4, 8, then steps of 8 and, beyond 128, of an eighth."""
    sizes, size = [], 1
    while size < most:
        sizes.append(size)
        size += size if size < 8 else max(8, 1 << size.bit_length() - 4)
    return [*sizes, most]


def cuda_capture() -> Capture:
    """Captures CUDA graphs that share one pool of memory: of all graphs only one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(launch: Callable[[], None]) -> Callable[[], None]:
        # Once before: kernels are compiled, libraries take their workspaces.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a collective's watchdog) may ask the driver things meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            launch()
        replay: Callable[[], None] = graph.replay
        return replay

    return capture


class GraphRunner:
    """A `Runner` that replays steps in which every row is one token and draws the next."""

    def __init__(
        self,
        decoder: Decoder,
        cache: list[KVLayer],
        *,
        eager: EagerRunner,
        capture: Capture,
        draw: Draw | None,
        max_rows: int,
        max_model_len: int,
        device: torch.device,
        recall: Recall | None = None,
    ) -> None:
        """draw: None where tokens are drawn outside the graph (a vocabulary that ranks share). max_rows: of a graph.

        recall: see `EagerRunner`, which has the same; slot `max_rows` is nobody's.
        """
        self._decoder = decoder
        self._cache = cache
        self._eager = eager
        self._capture = capture
        self._draw = draw if decoder.has_head else None
        self._recall: Recall = recall or AllKnown()
        self._sizes = graph_sizes(max_rows)
        page_size = cache[0].k_NKBE.shape[2]
        self._inputs = _Inputs(max_rows, max_model_len=max_model_len, page_size=page_size, device=device)
        self._hidden_TD = torch.zeros(max_rows, decoder.spec.hidden_size, device=device)
        columns = decoder.logits(self._hidden_TD[:1]).shape[1] if decoder.has_head else 0
        self._logits_RV = torch.zeros(max_rows, columns, device=device)
        self._tokens_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self._batch: StepBatch | None = None  # the one that is in the fixed memory, held so that no other passes for it
        self._replay: Callable[[], None] | None = None

    def prepare(self, *, show: bool = True) -> None:
        """Capture every graph now, with progress; one that is not captured by its first step is captured then.

        Raises: StartupError where one cannot be captured.
        """
        with Progress("Capturing graphs", total=len(self._sizes), unit="graphs", show=show) as progress:
            for size in reversed(self._sizes):  # the largest first: the others find its memory free
                try:
                    self._graph(size)
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise StartupError(
                        f"the CUDA graph of {size} rows could not be captured ({reason}): use --enforce-eager to do "
                        f"without graphs, or lower --max-num-seqs ({self._sizes[-1]})"
                    ) from error
                progress.advance()

    def _graph(self, size: int) -> Callable[[], None]:
        if size not in self._graphs:
            self._inputs.clear()  # a capture may run what it records
            self._graphs[size] = self._capture(lambda: self._launch(size))
        return self._graphs[size]

    def _launch(self, size: int) -> None:
        """All of one step of `size` rows, from and to fixed memory."""
        batch = self._inputs.rows(size)
        hidden_TD = self._hidden_TD[:size]
        if self._decoder.embeds:
            token_ids_T = self._recall.fill(batch.token_ids_T, batch.seq_slots_T)
            hidden_TD.copy_(self._decoder.embed(token_ids_T, batch.positions_T))
        self._decoder.run(hidden_TD, Step(batch.positions_T, batch.kv_slots_T, batch.attention), self._cache)
        if self._decoder.has_head:
            logits_RV = self._decoder.logits(hidden_TD)
            # Copied, though they are many: kept as they are, every graph would need memory for its own.
            self._logits_RV[:size].copy_(logits_RV)
            if self._draw is not None:
                tokens_R = self._tokens_R[:size].copy_(self._draw(logits_RV, batch.sampling))
                self._recall.store(batch.seq_slots_T, tokens_R)

    # As a runner

    def upload(self, batch: StepBatch) -> StepBatch:
        rows = batch.token_ids_T.shape[0]
        if batch.attention.max_query_len != 1 or len(batch.slots) != rows or rows > self._sizes[-1]:
            self._batch = self._replay = None
            return self._eager.upload(batch)
        size = next(size for size in self._sizes if size >= rows)
        self._replay = self._graph(size)
        self._batch = self._inputs.fill(batch, size)
        return self._batch

    def embed(self, batch: StepBatch) -> Tensor:
        if batch is not self._batch:
            return self._eager.embed(batch)
        return self._hidden_TD[: batch.token_ids_T.shape[0]]  # filled by the graph

    def layers(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        if batch is not self._batch or self._replay is None:
            return self._eager.layers(hidden_TD, batch)
        own_TD = self._hidden_TD[: hidden_TD.shape[0]]
        if not self._decoder.embeds:
            own_TD.copy_(hidden_TD)
        self._replay()
        return own_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        return self._eager.logits(hidden_RD)

    def row_logits(self, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
        if batch is not self._batch:
            return self._eager.row_logits(hidden_TD, batch)
        return self._logits_RV[: batch.rows_R.shape[0]]

    def drawn(self, batch: StepBatch) -> Tensor | None:
        if batch is not self._batch or self._draw is None:
            return None
        return self._tokens_R[: batch.rows_R.shape[0]]


class _Inputs:
    """The fixed memory that graphs read a step from, one for all sizes."""

    def __init__(self, max_rows: int, *, max_model_len: int, page_size: int, device: torch.device) -> None:
        self._max_model_len = max_model_len
        max_pages = -(-max_model_len // page_size)
        blank = _blank_batch(max_rows)
        tensors = tensors_of(blank)
        starts, self._table_start = lay_out(tensors)
        table = torch.zeros(max_rows * max_pages, dtype=torch.int32)
        self._staging = Staging(self._table_start + table.nbytes, device)
        self._flat = torch.zeros(self._staging.bytes.shape, dtype=torch.uint8, device=device)
        # Rows are longer here than in what is sent, which has a step's longest sequence's pages.
        self._table_SP = table.view(max_rows, max_pages).to(device)
        self._host, self._device = (
            with_tensors(
                blank,
                [carve(memory, start, tensor) for start, tensor in zip(starts, tensors, strict=True)],
                block_table_SP=self._table_SP,
            )
            for memory in (self._staging.bytes, self._flat)
        )
        for mine, tensor in zip(tensors_of(self._host), tensors, strict=True):
            mine.copy_(tensor)
        self._send(self._table_start)

    def clear(self) -> None:
        """Nothing but rows too many."""
        self._staging.wait()
        self._pad(0, self._host.token_ids_T.shape[0])
        self._send(self._table_start)

    def fill(self, batch: StepBatch, size: int) -> StepBatch:
        """Take in a batch, for a graph of `size` rows. Returns it as it lies here."""
        rows, pages = batch.attention.block_table_SP.shape
        self._staging.wait()
        for mine, its in zip(tensors_of(self._host), tensors_of(batch), strict=True):
            mine[: its.shape[0]].copy_(its)
        self._pad(rows, size)
        table = batch.attention.block_table_SP
        carve(self._staging.bytes, self._table_start, table).copy_(table)
        self._send(self._table_start + table.nbytes)
        self._table_SP[:rows, :pages].copy_(carve(self._flat, self._table_start, table))
        tensors = [mine[: its.shape[0]] for mine, its in zip(tensors_of(self._device), tensors_of(batch), strict=True)]
        return with_tensors(batch, tensors, block_table_SP=self._table_SP[:rows, :pages])

    def _pad(self, start: int, stop: int) -> None:
        self._host.kv_slots_T[start:stop] = -1
        self._host.seq_slots_T[start:stop] = self._host.seq_slots_T.shape[0]
        self._host.attention.kv_lens_S[start:stop] = 0

    def _send(self, num_bytes: int) -> None:
        self._staging.send(self._flat[:num_bytes])

    def rows(self, size: int) -> StepBatch:
        """The first rows, as a graph reads them. What the host knows of a batch is the most that it may be."""
        tensors = [tensor[:size] for tensor in tensors_of(self._device)]
        batch = with_tensors(self._device, tensors, block_table_SP=self._table_SP[:size])
        attention = replace(
            batch.attention,
            query_start_S1=self._device.attention.query_start_S1[: size + 1],
            num_decodes=size,
            max_kv_len=self._max_model_len,
            query_lens=(1,) * size,
            kv_lens=(self._max_model_len,) * size,
        )
        return replace(batch, attention=attention)


def _blank_batch(rows: int) -> StepBatch:
    """Rows too many, in the host's memory, that may sample in every way."""
    longs, ints, floats = (torch.zeros(rows, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32))
    attention = AttentionBatch(
        query_start_S1=torch.arange(rows + 1, dtype=torch.int32),
        kv_lens_S=ints,
        block_table_SP=torch.zeros(rows, 0, dtype=torch.int32),
        num_decodes=rows,
        max_query_len=1,
        max_kv_len=0,
        query_lens=(),
        kv_lens=(),
    )
    sampling = SamplingBatch(
        temperature_R=floats,
        top_k_R=ints,
        top_p_R=torch.ones(rows),
        min_p_R=floats,
        seed_R=longs,
        position_R=longs,
        all_greedy=False,
        max_top_k=2**31 - 1,
        any_top_p=True,
        any_min_p=True,
    )
    return StepBatch(
        token_ids_T=longs,
        positions_T=longs,
        kv_slots_T=torch.full((rows,), -1),
        seq_slots_T=torch.full((rows,), rows),
        attention=attention,
        rows_R=torch.arange(rows),
        slots=[],
        next_positions=np.zeros(0, np.int32),
        sampling=sampling,
    )
