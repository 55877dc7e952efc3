"""Calibration: text on its way through the layers of a model, and what reaches each weight there.

Layers run one by one, outside of the scan. An `Observed` around a weight notes what its products sum over, so that no
file of the model knows of calibration.

Shapes: B batch, T position, D embed, M rows, I inputs, E experts.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.data.batch import TokenBatch
from jaxllm.data.pack import Row, Rows
from jaxllm.data.store import TokenStore
from jaxllm.errors import DataError, SettingsError
from jaxllm.model.build import Model, Params
from jaxllm.weights import seam
from jaxllm.weights.form import Form

Where = tuple[str, str, int | None]


#: Tokens of a batch whose inputs are kept one by one.
SAMPLE = 64


class Stats(NamedTuple):
    """Sums over all tokens that reached a weight, in float32."""

    gram_II: jax.Array
    """`[E?, I, I]`: X^T X; its diagonal holds the squared norms of the inputs."""
    size_I: jax.Array
    """`[E?, I]`: |x|."""
    sample_SI: jax.Array
    """`[E?, S, I]`: x of some tokens, those of all batches together."""

    def __add__(self, other: "Stats") -> "Stats":
        sample_SI = jnp.concatenate([self.sample_SI, other.sample_SI], axis=-2)
        return Stats(self.gram_II + other.gram_II, self.size_I + other.size_I, sample_SI)


def _some(x_MI: jax.Array) -> jax.Array:
    """SAMPLE rows, evenly spread, or all where there are fewer."""
    return x_MI[..., :: max(1, x_MI.shape[-2] // SAMPLE), :][..., :SAMPLE, :]


class Observed:
    """A weight that gives `note` the statistics of what reaches it. It lives within one trace."""

    def __init__(self, weight, form: Form, note: Callable[[Stats], None]):
        self.weight, self.form, self.note = weight, form, note

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        x_EMI = self.form.enter(equation, x).astype(jnp.float32)
        e = "e" if self.form.experts else ""
        rows = tuple(range(len(e), x_EMI.ndim - 1))
        gram_II = jnp.einsum(f"{e}...i,{e}...j->{e}ij", x_EMI, x_EMI, precision="highest")
        flat_EMI = x_EMI.reshape(*self.form.experts, -1, self.form.inputs)
        self.note(Stats(gram_II, jnp.sum(jnp.abs(x_EMI), axis=rows), _some(flat_EMI)))
        return seam.einsum(equation, x, self.weight, dtype=dtype)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_MD.shape[0]), side="right")

        def of(expert):
            mine_MD = jnp.where((expert_M == expert)[:, None], x_MD, 0).astype(jnp.float32)
            gram_DD = jnp.einsum("md,mf->df", mine_MD, mine_MD, precision="highest")
            first = jnp.argsort(expert_M != expert)[:SAMPLE]  # zeros where an expert has fewer tokens
            return Stats(gram_DD, jnp.sum(jnp.abs(mine_MD), axis=0), mine_MD[first])

        self.note(jax.lax.map(of, jnp.arange(sizes_E.shape[0])))
        return seam.grouped_matmul(x_MD, self.weight, sizes_E, block=block)


class Flow:
    """Calibration text between two layers of a model."""

    def __init__(self, model: Model, params: Params, batches: Sequence[TokenBatch]):
        self.model = model
        self.where = [dict(positions_BT=b.positions_BT, segments_BT=b.segments_BT) for b in batches]
        embedded = jax.jit(model.embedded)
        self.x = [embedded(params, b.tokens_BT, **w) for b, w in zip(batches, self.where, strict=True)]
        self._run = jax.jit(self._layer, static_argnums=(0, 1, 2))

    def onto(self, model: Model) -> "Flow":
        """The same text, shared, in another model of this width: what one takes through a layer is there for both."""
        other = copy.copy(self)
        other.model = model
        other._run = jax.jit(other._layer, static_argnums=(0, 1, 2))
        return other

    def observe(self, where: Where, weights: Params, forms: dict[str, Form]) -> dict[str, Stats]:
        """What reaches the weights of a layer, by their paths within it; the text stays before the layer."""
        total = None
        for x_BTD, at in zip(self.x, self.where, strict=True):
            _, found = self._run(*where[:2], tuple(forms.items()), weights, x_BTD, at)
            total = found if total is None else {path: total[path] + one for path, one in found.items()}
        return total

    def advance(self, where: Where, weights: Params) -> None:
        """Takes the text through the layer."""
        for i, at in enumerate(self.where):
            self.x[i], _ = self._run(*where[:2], (), weights, self.x[i], at)

    def _layer(self, group: str, slot: str, forms: tuple[tuple[str, Form], ...], weights, x_BTD, at):
        """`(the layer's output, statistics)`."""
        forms, found = dict(forms), {}

        def observed(path, weight):
            return Observed(weight, forms[path], functools.partial(found.__setitem__, path))

        def wrap(path, weight):
            return observed(path, weight) if path in forms else weight

        weights = tree.map_with_path(wrap, weights, is_leaf=_is_weight)
        return self.model.layer(group, slot, weights, x_BTD, **at), found


def check_single_process() -> None:
    """Raises SettingsError where several processes hold the model."""
    if jax.process_count() > 1:
        raise SettingsError(f"calibration runs in one process, not in {jax.process_count()}; start a single one")


def layer_of(params: Params, where: Where) -> Params:
    """The weights of one layer, without a stack."""
    group, slot, place = where
    weights = params[group][slot]
    return weights if place is None else jax.tree.map(lambda w: w[place], weights)


def joined(model: Model, layers: Sequence[Params]) -> Params:
    """The weights of all layers, in order, where the model keeps them, on the host; those of a slot stacked."""
    found: dict[tuple[str, str], list[Params]] = {}
    for (group, slot, _), weights in zip(model.layers, layers, strict=True):
        found.setdefault((group, slot), []).append(jax.device_get(weights))
    out: Params = {}
    for (group, slot), of in found.items():
        one = of[0] if group != "layers" else jax.tree.map(lambda *xs: np.stack(xs), *of)
        out.setdefault(group, {})[slot] = one
    return out


def batches_of(
    model: Model, store: TokenStore, tokens: int, needed: int, *, seq_len: int, rows: int = 8
) -> list[TokenBatch]:
    """Full rows from all over the text, about `tokens` tokens together, in batches.

    Raises DataError where the text has fewer than `needed`.
    """
    line = Rows(store, seq_len, seed=0)
    chosen: list[Row] = []
    for r in range(line.per_epoch):
        if len(chosen) * seq_len >= tokens:
            break
        if (row := line.row(r)).segments.all():
            chosen.append(row)
    if len(chosen) * seq_len < needed:
        raise DataError(
            f"{store.name}: the calibration text is too short: {len(chosen)} whole rows of {seq_len} tokens are "
            f"{len(chosen) * seq_len:,} tokens, and the widest matrix has {needed:,} inputs, so that many are needed "
            "at least; give more text"
        )
    rows = -(-rows // model.sharding.batch_size) * model.sharding.batch_size
    parts = [chosen[i : i + rows] for i in range(0, len(chosen), rows)]
    return [TokenBatch(*map(np.stack, zip(*part, strict=True))) for part in parts]


def _is_weight(x) -> bool:
    return not isinstance(x, dict)
