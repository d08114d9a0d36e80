"""What one rank holds of a model: which layers, which heads, how many weights. Pure arithmetic on a `ModelSpec`."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from ..parallel.grid import Grid, Place
from ..parallel.partition import HeadCut, cut_heads, cut_layers, cut_mlp, cut_vocab, length
from .errors import ConfigError
from .models.spec import ModelSpec

MLP_UNIT = 32  # columns: a dense MLP is cut in these, so that matrix kernels meet whole tiles


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of `spec`."""

    spec: ModelSpec
    place: Place
    layers: range  # of the whole model's, by global index

    @property
    def heads(self) -> HeadCut:
        spec = self.spec
        return cut_heads(spec.num_heads, spec.num_kv_heads, shard=self.place.shard, size=self.place.grid.tp)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(KV heads, head dim) of the rank's cache, for each of its layers."""
        return self.heads.num_kv, self.spec.head_dim

    def mlp_columns(self, index: int, *, group: int = 1) -> slice:
        """Of a layer, by global index. group: columns of the matrix that share a scale."""
        unit = max(group, MLP_UNIT)
        return cut_mlp(self.spec.layers[index].mlp.size, shard=self.place.shard, size=self.place.grid.tp, unit=unit)

    def products(self) -> Set[tuple[int, int]]:
        """(out, in) of the products of a layer, of all that differ."""
        spec, heads, hidden = self.spec, self.heads, self.spec.hidden_size
        found = {
            ((heads.num_query + 2 * heads.num_kv) * spec.head_dim, hidden),
            (hidden, heads.num_query * spec.head_dim),
        }
        for index in self.layers:
            columns = length(self.mlp_columns(index))
            found |= {((2 if spec.layers[index].mlp.gated else 1) * columns, hidden), (hidden, columns)}
        return found

    def num_weights(self) -> int:
        """Elements of the matrices that this rank holds. Norms and biases, a thousandth of it, are left out."""
        vocabulary = self._vocabulary_weights()
        ends = vocabulary if self.place.is_first else 0
        if self.place.is_last and not (self.place.is_first and self.spec.tied):
            ends += vocabulary
        return sum(self.layer_weights(index) for index in self.layers) + ends

    def layer_weights(self, index: int) -> int:
        spec, heads, mlp = self.spec, self.heads, self.spec.layers[index].mlp
        columns = length(self.mlp_columns(index))
        attention = (2 * heads.num_query + 2 * heads.num_kv) * spec.head_dim
        return spec.hidden_size * (attention + (3 if mlp.gated else 2) * columns)

    def _vocabulary_weights(self) -> int:
        spec, place = self.spec, self.place
        rows = length(cut_vocab(spec.vocab_size, shard=place.shard, size=place.grid.tp))
        positions = spec.max_len if spec.learned_positions and place.is_first else 0
        return (rows + positions) * spec.hidden_size


def deal(spec: ModelSpec, grid: Grid, told: Sequence[int] | None = None) -> list[Share]:
    """Every rank's share, by rank. told: layers of each stage (`--pp-layers`); default: stages of equal cost.

    A stage's cost is the weights it multiplies with for one token, the head's included; an embedding is looked up,
    which costs next to nothing. Raises ConfigError where the model cannot be cut so, with what is possible.
    """
    _check_width(spec, grid)
    layers = _stages(spec, grid, told)
    return [Share(spec, place, layers[place.stage]) for place in grid]


def _check_width(spec: ModelSpec, grid: Grid) -> None:
    widest = min(spec.num_heads, *(layer.mlp.size for layer in spec.layers))
    if grid.tp > widest:
        raise ConfigError(
            f"--tensor-parallel-size {grid.tp}: a {spec.family} model of {spec.num_heads} attention heads and "
            f"{spec.num_kv_heads} KV heads can be cut over 1 to {widest} ranks, and evenly over "
            f"{_even_widths(spec, widest)}"
        )


def _even_widths(spec: ModelSpec, widest: int) -> str:
    even = [tp for tp in range(1, widest + 1) if spec.num_heads % tp == 0 and max(spec.num_kv_heads, tp) % tp == 0]
    return ", ".join(map(str, even))


def _stages(spec: ModelSpec, grid: Grid, told: Sequence[int] | None) -> list[range]:
    num = spec.num_layers
    if grid.pp > num:
        raise ConfigError(f"--pipeline-parallel-size {grid.pp}: {spec.family} has {num} layers; possible: 1 to {num}")
    if told is None:
        whole = Share(spec, Grid().place(0), range(num))
        costs = [whole.layer_weights(index) for index in range(num)]
        return cut_layers(costs, stages=grid.pp, head=spec.vocab_size * spec.hidden_size)
    if len(told) != grid.pp or sum(told) != num or min(told) < 1:
        listed = ",".join(map(str, told))
        raise ConfigError(
            f"--pp-layers {listed}: names {len(told)} stages of {sum(told)} layers; needed are {grid.pp} stages "
            f"(--pipeline-parallel-size) of at least one layer each, {num} in all"
        )
    bounds = [sum(told[:stage]) for stage in range(grid.pp + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]
