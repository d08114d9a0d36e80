"""Which tile a quantised product takes: a pure table of the shape, the same on every device and in every run.

Decoding is bound by reading the weight, so a tile is as narrow in rows as the step, and the columns are split until
every multiprocessor reads: about three programs for each of some 130. From 65 rows on tiles grow towards what suits
tensor cores.
"""

from typing import NamedTuple

FEW_ROWS = 16  # at most so many share a launch with what stands around a product. Not measured.
DECODE_ROWS = 64  # at most so many rows are one tile: every code is read once
# Tiles that make the numbers of a code anew for every 128 rows issue as many instructions for that as the tensor cores
# have cycles of work. From here it is faster to write the weight in 16 bits once (vLLM's AWQ: from 256). Not measured.
DENSE_FROM = 512
_SLAB_WEIGHTS = 1 << 25  # unpacked at a time: 64 MiB
_SPLIT_ROWS = 256  # more of them fill the device without a split
_PROGRAMS = 400  # at most three find room on a multiprocessor
_NARROWEST_BLOCK = 32  # columns: where groups of 8-bit codes ask for it, else 128
_NARROWEST = 64  # features of a tile: what a warp group multiplies


class Tile(NamedTuple):
    """rows x features of the result a program, the columns dealt out to `splits` programs."""

    rows: int
    features: int
    splits: int
    warps: int
    stages: int


def slab_features(features: int, inner: int) -> int:
    """Rows of a weight [features, inner] that are unpacked at once."""
    return min(features, max(_SLAB_WEIGHTS // max(inner, 1), 1))


def scratch_bytes(rows: int, features: int, inner: int, *, deterministic: bool = False) -> int:
    """What a product of up to `rows` rows keeps beside operands and result, at most: parts in float32, or a slab."""
    slab = 0 if rows < DENSE_FROM or deterministic else 2 * slab_features(features, inner) * inner
    split_rows = min(rows, _SPLIT_ROWS)
    blocks = -(-inner // _NARROWEST_BLOCK)
    parts = [0]
    for some in (*range(16, split_rows, 16), split_rows):  # within a tile's rows more of them are more parts
        tile = weight_only_tile(some, features, blocks, deterministic=deterministic)
        parts.append(4 * tile.splits * some * features if tile.splits > 1 else 0)
    return max(slab, *parts)


def most_tickets(features: int) -> int:
    """Tiles of a product whose columns are split, at most."""
    return -(-features // _NARROWEST) * (_SPLIT_ROWS // DECODE_ROWS)


def weight_only_tile(rows: int, features: int, blocks: int, *, deterministic: bool = False) -> Tile:
    """blocks: of columns, the least that a split takes a few of. deterministic: one tile for any number of rows."""
    if deterministic:
        return Tile(rows=64, features=64, splits=1, warps=4, stages=4)
    if rows > _SPLIT_ROWS:
        return Tile(rows=128, features=128, splits=1, warps=8, stages=3)
    tile_rows = 16 if rows <= 16 else 32 if rows <= 32 else DECODE_ROWS
    wide = features >= 2048
    tile_features = 128 if wide else _NARROWEST
    tiles = -(-features // tile_features) * -(-rows // tile_rows)
    splits = 1
    while splits < 8 and 2 * splits * tiles <= _PROGRAMS and blocks >= 4 * splits:
        splits *= 2
    warps = 8 if wide and tile_rows > 16 else 4
    return Tile(tile_rows, tile_features, splits, warps, stages=4 if tile_rows <= 32 else 3)


def few_rows_tile(features: int, blocks: int, *, normed: bool) -> Tile:
    """normed: of the residual stream, in float32, of which fewer stages leave room for three programs."""
    tile = weight_only_tile(FEW_ROWS, features, blocks)
    return tile._replace(stages=3) if normed else tile


def eight_bit_tile(rows: int, features: int, *, grouped: bool) -> Tile:
    """For activations in 8 bits, whose rows are more than a decode's. grouped: sums are scaled on the way."""
    if rows <= _SPLIT_ROWS:
        return Tile(rows=64, features=128, splits=1, warps=4, stages=4)
    if grouped or features < 2048:  # two sums for each number do not fit the registers of a wider one
        return Tile(rows=128, features=128, splits=1, warps=8, stages=4)
    return Tile(rows=128, features=256, splits=1, warps=8, stages=3)
