"""The operations that `shoal bench kernels` times: random tensors in a model's shapes, and what each must move and do.

Shape letters are those of `kernels/ops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, device, dtype

from ..kernels.linear import Linear
from ..kernels.ops import AttentionBatch, HeadNorms, HeadSpec, KVLayer, Ops, Rotation, SamplingBatch
from ..kernels.select import select_ops
from ..parallel.codes import Codes, Float8, Kind, Quantised
from ..parallel.grid import Grid
from ..parallel.quant import DenseLinear, LinearMethod, select_kernels
from ..runtime import kv
from ..runtime.config import EngineConfig
from ..runtime.models.spec import ModelSpec, NormKind, QKNorm
from ..runtime.share import deal
from .bench_kernels import Call, Case, KernelPlan
from .offline import engine_config

PAGE: int = EngineConfig.model_fields["block_size"].default
COLD_BYTES = 256 * 2**20  # more than any cache holds
MAX_COPIES = 32
PREFILL = 512  # tokens of a step that reads a prompt, for the products
GROUP = 128  # columns that share a scale in the codes we make
SAMPLERS = {"greedy": (0.0, 0, 1.0), "temperature 1": (1.0, 0, 1.0), "top-k 50, top-p 0.9": (1.0, 50, 0.9)}


def copies(num_bytes: float) -> int:
    """How many of something are to be gone round over, so that each is cold."""
    return max(1, min(MAX_COPIES, round(COLD_BYTES / max(1.0, num_bytes))))


def ceiling_cases(on: device, dtype: dtype) -> tuple[Case, Case]:
    """A copy of what no cache holds, and a square product."""
    source = torch.zeros(COLD_BYTES // 2, dtype=torch.uint8, device=on)
    target = torch.empty_like(source)
    side = 1024 if on.type == "cpu" else 8192
    a, b = torch.randn(side, side, device=on).to(dtype), torch.randn(side, side, device=on).to(dtype)
    copy = Case("copy", [partial(target.copy_, source)], 2.0 * source.nbytes)
    return copy, Case("product", [partial(torch.mm, a, b)], 3.0 * a.nbytes, 2.0 * side**3)


def cases(spec: ModelSpec, plan: KernelPlan, on: device, dtype: dtype) -> Iterator[Case]:
    """Everything, made one after the other as it is asked for."""
    ops = select_ops(on)
    config = engine_config(spec.family, {("engine", "kv_cache_dtype"): plan.kv_cache_dtype})
    shapes = _Shapes(spec, ops, dtype, kv_dtype=kv.cache_dtype(config, dtype))
    for tokens in (*plan.batches, PREFILL):
        yield shapes.norm(tokens)
        yield shapes.heads(tokens)
        yield shapes.activation(tokens)
    for context in plan.contexts:
        for batch in plan.batches:
            yield shapes.decode_attention(batch, context)
        yield shapes.prefill_attention(context)
    for kind in ("dense", *Kind):
        for tokens in (*plan.batches, PREFILL):
            if (case := shapes.products(kind, tokens)) is not None:
                yield case
    for rows in plan.batches:
        yield shapes.head(rows)
        for name in SAMPLERS:
            yield shapes.sampling(name, rows)


class _Shapes:
    """Makes cases of one model, for one device and dtype."""

    def __init__(self, spec: ModelSpec, ops: Ops, dtype: dtype, *, kv_dtype: dtype) -> None:
        self._spec, self._ops, self._on, self._dtype = spec, ops, ops.device, dtype
        self._item, self._kv_dtype = dtype.itemsize, kv_dtype
        self._share = replace(deal(spec, Grid(1, 1))[0], layers=range(1))
        self._layer = spec.layers[0]
        self._heads, self._kv_heads, self._dim = spec.num_heads, spec.num_kv_heads, spec.head_dim

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self._on).to(self._dtype)

    def norm(self, tokens: int) -> Case:
        size, norm = self._spec.hidden_size, self._spec.norm
        weight_D = torch.ones(size, device=self._on)
        num_bytes = tokens * size * (2 * self._item + 8)

        def make() -> Call:
            x_TD, residual_TD = self._randn(tokens, size), torch.zeros(tokens, size, device=self._on)
            if norm.kind is NormKind.RMS:
                return partial(self._ops.add_rms_norm, x_TD, residual_TD, weight_D, eps=norm.eps)
            return partial(self._ops.add_layer_norm, x_TD, residual_TD, weight_D, None, eps=norm.eps)

        return self._case(f"add and norm, {tokens} tokens", make, num_bytes)

    def heads(self, tokens: int) -> Case:
        """Norms and rotation of queries and keys, and the write into the cache."""
        dim, rope = self._dim, self._layer.rope
        num = self._heads + 2 * self._kv_heads
        ones_E = torch.ones(dim, device=self._on)
        norms = HeadNorms(ones_E, ones_E, self._spec.norm.eps) if self._spec.qk_norm is QKNorm.HEAD else None
        rotation = None
        if rope is not None:
            cos_sin_MC = torch.rand(tokens, 2 * len(rope.inv_freq), device=self._on)
            rotation = Rotation(cos_sin_MC, rope.interleaved)
        head_spec = HeadSpec(self._heads, self._kv_heads, norms, rotation)
        cache, slots_T = self._cache(-(-tokens // PAGE)), torch.arange(tokens, device=self._on)

        def make() -> Call:
            qkv_TNE = self._randn(tokens, num, dim)
            return partial(self._ops.rotate_and_store, qkv_TNE, cache, head_spec, positions_T=slots_T, slots_T=slots_T)

        return self._case(f"rotate and store, {tokens} tokens", make, 2.0 * tokens * num * dim * self._item)

    def activation(self, tokens: int) -> Case:
        mlp = self._layer.mlp
        width = 2 * mlp.size if mlp.gated else mlp.size
        call = self._ops.gated_activation if mlp.gated else self._ops.activation
        num_bytes = tokens * (width + mlp.size) * self._item
        name = f"activation, {tokens} tokens"
        return self._case(name, lambda: partial(call, self._randn(tokens, width), mlp.activation), num_bytes)

    def decode_attention(self, batch: int, context: int) -> Case:
        name = f"decode attention, {batch} x {context}"
        return self._attention(name, [1] * batch, [context] * batch)

    def prefill_attention(self, context: int) -> Case:
        return self._attention(f"prefill attention, {context}", [context], [context])

    def _attention(self, name: str, query_lens: list[int], kv_lens: list[int]) -> Case:
        tokens, spec = sum(query_lens), self._layer.attention
        window = spec.window or max(kv_lens)
        seen = [min(kv, window) for kv in kv_lens]
        pairs = sum(_pairs(q, kv, window) for q, kv in zip(query_lens, kv_lens, strict=True))
        kv_bytes = sum(seen) * kv.bytes_per_block(self._share, block_size=1, dtype=self._kv_dtype)
        batch = make_batch(query_lens, kv_lens, self._on)
        num_pages = sum(-(-kv // PAGE) for kv in kv_lens)
        num_bytes = kv_bytes + 2.0 * tokens * self._heads * self._dim * self._item
        # Parts of one pool, which the system then holds in huge pages, as it does an engine's.
        pool = self._cache(num_pages * copies(num_bytes))
        parts = (_pages(pool, start, start + num_pages) for start in range(0, len(pool.k_NKBE), num_pages))

        def make() -> Call:
            q_THE = self._randn(tokens, self._heads, self._dim)
            return partial(self._ops.attention, q_THE, next(parts), batch, spec)

        return self._case(name, make, num_bytes, 4.0 * pairs * self._heads * self._dim)

    def _cache(self, num_pages: int) -> KVLayer:
        """Of one layer, as an engine has it, with something in it."""
        (cache,) = kv.allocate(
            self._share, num_blocks=num_pages, block_size=PAGE, dtype=self._kv_dtype, device=self._on
        )
        for pages in cache:
            pages.copy_(torch.randn(pages.shape, device=self._on))
        return cache

    def products(self, kind: str | Kind, tokens: int) -> Case | None:
        """All products of one layer. None: this device has no kernel for these weights."""
        spec, mlp = self._spec, self._layer.mlp
        heads = (self._heads + 2 * self._kv_heads) * self._dim
        up = 2 * mlp.size if mlp.gated else mlp.size
        sizes = [(heads, spec.hidden_size), (spec.hidden_size, self._heads * self._dim)]
        sizes += [(up, spec.hidden_size), (spec.hidden_size, mlp.size)]
        methods = [self._method(kind, rows, columns) for rows, columns in sizes]
        if None in methods:
            return None
        inputs = {columns: self._randn(tokens, columns) for _, columns in sizes}
        num_bytes = sum(method.num_bytes() for method in methods if method is not None)
        num_bytes += tokens * sum(rows + columns for rows, columns in sizes) * self._item

        def make() -> Call:
            layer = [method for rows, columns in sizes if (method := self._method(kind, rows, columns)) is not None]
            return lambda: [method.apply(inputs[method.in_features]) for method in layer]

        label = kind.value if isinstance(kind, Kind) else kind
        flops = 2.0 * tokens * sum(rows * columns for rows, columns in sizes)
        return self._case(f"products of a layer, {label}, {tokens} tokens", make, num_bytes, flops)

    def _method(self, kind: str | Kind, rows: int, columns: int) -> LinearMethod | None:
        kernels = select_kernels(self._on, self._dtype)
        if not isinstance(kind, Kind):
            weight_FD = self._randn(rows, columns)
            return kernels.dense(weight_FD) or DenseLinear(weight_FD, self._ops.linear)
        return kernels.make(random_weight(kind, rows, columns)) if kind in kernels.kinds else None

    def head(self, rows: int) -> Case:
        """The product with the vocabulary, dense."""
        vocab, size = self._spec.vocab_size, self._spec.hidden_size
        x_RD = self._randn(rows, size)
        product: Linear = self._ops.linear
        num_bytes = (vocab * size + rows * (vocab + size)) * self._item
        make = lambda: partial(product, x_RD, self._randn(vocab, size))  # noqa: E731
        return self._case(f"head, dense, {rows} rows", make, num_bytes, 2.0 * rows * vocab * size)

    def sampling(self, name: str, rows: int) -> Case:
        temperature, top_k, top_p = SAMPLERS[name]
        places = torch.arange(rows, device=self._on)
        sampling = SamplingBatch(
            temperature_R=torch.full((rows,), temperature, device=self._on),
            top_k_R=torch.full((rows,), top_k, dtype=torch.int32, device=self._on),
            top_p_R=torch.full((rows,), top_p, device=self._on),
            min_p_R=torch.zeros(rows, device=self._on),
            seed_R=places,
            position_R=places,
            all_greedy=temperature == 0,
            max_top_k=top_k,
            any_top_p=top_p < 1,
            any_min_p=False,
        )
        vocab = self._spec.vocab_size

        def make() -> Call:
            return partial(self._ops.sample, 3 * torch.randn(rows, vocab, device=self._on), sampling)

        return self._case(f"sample, {name}, {rows} rows", make, 4.0 * rows * vocab)

    def _case(self, name: str, make: Callable[[], Call], num_bytes: float, flops: float = 0.0) -> Case:
        return Case(name, [make() for _ in range(copies(num_bytes))], num_bytes, flops)


def _pages(pool: KVLayer, start: int, stop: int) -> KVLayer:
    scales = (None if scale is None else scale[start:stop] for scale in (pool.k_scale_NKB, pool.v_scale_NKB))
    return KVLayer(pool.k_NKBE[start:stop], pool.v_NKBE[start:stop], *scales)


def _pairs(query: int, kv: int, window: int) -> int:
    """Queries times the tokens that each sees."""
    return sum(min(place + 1, window) for place in range(kv - query, kv))


def random_weight(kind: Kind, rows: int, columns: int) -> Quantised:
    """Codes of a kind, with scales as a checkpoint of that kind has them."""
    if kind is Kind.FLOAT8:
        return Float8(torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.ones(rows, 1))
    if kind is Kind.INT8:
        return Codes(
            torch.randint(-127, 128, (rows, columns), dtype=torch.int8), torch.ones(rows, 1), None, columns, columns
        )
    group = next(size for size in (GROUP, 64, 32, columns) if columns % size == 0)
    scale_FG = torch.full((rows, columns // group), 0.01)
    codes_FD = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    return Codes(codes_FD, scale_FG, torch.full_like(scale_FG, 8.0), group, columns)


def make_batch(query_lens: list[int], kv_lens: list[int], on: device) -> AttentionBatch:
    """Sequences of so many new tokens and so many in all, on pages in no order."""
    counts = [-(-kv // PAGE) for kv in kv_lens]
    table = torch.zeros(len(kv_lens), max(counts), dtype=torch.int32)
    pages, taken = torch.randperm(sum(counts)).to(torch.int32), 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = pages[taken : taken + count]
        taken += count
    return AttentionBatch(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32).to(on),
        kv_lens_S=torch.tensor(kv_lens, dtype=torch.int32, device=on),
        block_table_SP=table.to(on),
        num_decodes=sum(q == 1 for q in query_lens),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        query_lens=tuple(query_lens),
        kv_lens=tuple(kv_lens),
    )
