"""Low-rank adapters over a frozen weight of any type: LoRA, rsLoRA and DoRA, one or several, chosen row by row.

LoRA: Hu et al. 2021, arXiv 2106.09685, equation 3. rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024,
arXiv 2402.09353, equation 5.

Shapes: B row, I inputs, O outputs, R rank, A adapters, E experts. A stack of layers has one more leading axis, which
the scan over layers takes off.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxllm.errors import UserError
from jaxllm.kernels.experts import grouped_matmul, owners
from jaxllm.weights import seam
from jaxllm.weights.axes import Axes
from jaxllm.weights.form import Form, matrix_axes, split

STATIC = dict(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """`base + scale * lora_a lora_b`; with a magnitude, each output's weights are renormalised to it (DoRA)."""

    base: "seam.Weight"
    lora_a: jax.Array
    """float32 `[A?, E?, I, R]`"""
    lora_b: jax.Array
    """float32 `[A?, E?, R, O]`"""
    lora_magnitude: jax.Array | None
    """float32 `[A?, E?, O]`: the norm of each output's weights; None without DoRA."""
    form: Form = dataclasses.field(**STATIC)
    scale: float = dataclasses.field(**STATIC)
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA)."""
    dropout: float = dataclasses.field(default=0.0, **STATIC)
    """Share of the adapter's inputs that are zeroed in training."""
    adapters: int | None = dataclasses.field(default=None, **STATIC)
    """How many there are along the axis A; None for one without that axis."""
    key: jax.Array | None = None
    """Of the dropout, put here for one call by `bind`."""
    rows_B: jax.Array | None = None
    """int32: the adapter of each row of the batch, put here for one call by `bind`; -1 for none."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def several(self) -> bool:
        return self.adapters is not None

    @property
    def stacked(self) -> bool:
        """Whether the arrays lead with an axis over layers."""
        return self.lora_b.ndim > 2 + len(self.form.experts) + self.several

    def dense(self, dtype) -> jax.Array:
        """The merged weight, as an array in its own axes; no stack."""
        if self.several:
            raise UserError("these weights hold several adapters; choose one to merge")
        w_OI = self._merged()
        if self.lora_magnitude is not None:
            w_OI = w_OI * self._factor(w_OI)[..., None]
        return self.form.weight(w_OI).astype(dtype)

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        x_axes, w_axes, y_axes = split(equation)
        assert not self.several or x_axes[0] == y_axes[0] == "B", equation
        factor = None if self.lora_magnitude is None else self._factors()
        letters = self._row + self.form.letters(w_axes, "eo")
        if factor is not None and not set(letters) <= set(y_axes):
            # k_up in compressed latent attention: its outputs are summed over, so they are scaled before.
            x, factor = x * _along(factor, letters, x_axes).astype(x.dtype), None
        base = seam.einsum(equation, x, self.base, dtype=dtype)
        h = _dropped(x, self.dropout, self.key)
        delta = self._low_rank(equation, h, dtype).astype(base.dtype)
        if factor is None:
            return base + delta
        factor = _along(factor, letters, y_axes).astype(base.dtype)
        again = None if h is x else seam.einsum(equation, h, self.base, dtype=dtype)
        return _renormalised(base, delta, factor, again)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        if self.several:
            raise UserError("adapters by row do not reach experts without a capacity; leave moe/** out of the pattern")
        base = seam.grouped_matmul(x_MD, self.base, sizes_E, block=block)
        h = _dropped(x_MD, self.dropout, self.key)
        a_ER, b_EF = (part.astype(h.dtype) for part in (self.lora_a, self.lora_b))
        delta = self.scale * grouped_matmul(grouped_matmul(h, a_ER, sizes_E, block=block), b_EF, sizes_E, block=block)
        if self.lora_magnitude is None:
            return base + delta
        factor = self._factor(self._merged())[owners(sizes_E, x_MD.shape[0])].astype(base.dtype)
        again = None if h is x_MD else seam.grouped_matmul(h, self.base, sizes_E, block=block)
        return _renormalised(base, delta, factor, again)

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See `seam.take`: the rows of the table are the outputs."""
        rows = seam.take(self.base, ids, jnp.float32)
        if self.several:
            chosen = self._chosen()[:, None]
            picked = jnp.swapaxes(self.lora_b, -1, -2)[chosen, ids]
            h = jnp.einsum("BTr,BDr->BTD", picked, self._of_rows(self.lora_a))
            rows = rows + self.scale * self._where(h, 0)
        else:
            rows = rows + self.scale * jnp.einsum("...r,Dr->...D", self.lora_b.T[ids], self.lora_a)
        if self.lora_magnitude is not None:
            magnitude = self.lora_magnitude[chosen, ids] if self.several else self.lora_magnitude[ids]
            factor = magnitude / _norms(rows)
            rows = rows * (self._where(factor, 1) if self.several else factor)[..., None]
        return rows.astype(dtype)

    def _low_rank(self, equation: str, x, dtype):
        """The equation with `scale * a b` in the place of the weight, never multiplied out."""
        x_axes, w_axes, y_axes = split(equation)
        letters = {role: self.form.letters(w_axes, role) for role in "eio"}
        lead = self._row + letters["e"]
        a, b = (self._of_rows(part.astype(x.dtype)) for part in (self.lora_a, self.lora_b))
        first = lead + letters["i"] + "r", a.reshape(*a.shape[:-2], *self.form.sizes("i"), a.shape[-1])
        second = lead + "r" + letters["o"], b.reshape(*b.shape[:-1], *self.form.sizes("o"))
        if not set(letters["i"]) <= set(x_axes):
            first, second = second, first
        h_axes = "".join(name for name in x_axes if name not in first[0] or name in y_axes) + "r"
        h = self.scale * seam.einsum(f"{x_axes},{first[0]}->{h_axes}", x, first[1])
        if self.several:
            h = self._where(h, 0)
        return seam.einsum(f"{h_axes},{second[0]}->{y_axes}", h, second[1], dtype=dtype)

    def _factors(self):
        """DoRA's factor of each output, `[B?, E?, ...]` with the outputs' own axes."""
        factor = self._of_rows(self._factor(self._merged()))
        if self.several:
            factor = self._where(factor, 1)
        return factor.reshape(*factor.shape[:-1], *self.form.sizes("o"))

    @property
    def _row(self) -> str:
        """The letter of the axis that `_of_rows` leads with."""
        return "B" if self.several else ""

    def _of_rows(self, part):
        """Of several adapters' arrays those of each row, `[B, ...]`; of one the array itself."""
        return part[self._chosen()] if self.several else part

    def _chosen(self):
        if self.rows_B is None:
            raise UserError("these weights hold several adapters: say which one each row takes (adapters)")
        return jnp.maximum(self.rows_B, 0)

    def _where(self, values, other):
        """`values` in the rows that have an adapter."""
        return jnp.where((self.rows_B >= 0).reshape(-1, *[1] * (values.ndim - 1)), values, other)

    def _merged(self):
        """float32 `[A?, E?, O, I]`, without DoRA's renormalisation."""
        base = self.base if isinstance(self.base, jax.Array) else self.base.dense(jnp.float32)
        w_OI = self.form.matrix(base.astype(jnp.float32))
        return w_OI + self.scale * jnp.swapaxes(self.lora_a @ self.lora_b, -1, -2)

    def _factor(self, merged_OI):
        """`[A?, E?, O]`: DoRA's magnitude over the norm."""
        return self.lora_magnitude / _norms(merged_OI)

    def axes(self, axes: Axes) -> "Lora":
        """The logical axes of each array, by those of the weight."""
        lead, outputs, inputs = matrix_axes(self.form, axes)
        experts = lead[len(lead) - len(self.form.experts) :]
        lead = lead[: len(lead) - len(experts)] + (None,) * self.several + experts
        base = self.base.axes(axes) if hasattr(self.base, "axes") else axes
        magnitude = None if self.lora_magnitude is None else (*lead, outputs)
        a, b = (*lead, inputs, None), (*lead, None, outputs)
        return dataclasses.replace(self, base=base, lora_a=a, lora_b=b, lora_magnitude=magnitude)


def add_lora(
    base, form: Form, key: jax.Array, *, rank: int, alpha: float, rslora=False, dora=False, dropout: float = 0.0
) -> Lora:
    """A new adapter over a weight without a stack (use `jax.vmap` for one); it changes nothing yet, since b is 0.

    a is uniform within sqrt(1 / I), as in the authors' code and peft.
    """
    bound = math.sqrt(1 / form.inputs)
    a = jax.random.uniform(key, (*form.experts, form.inputs, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*form.experts, rank, form.outputs), jnp.float32)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    plain = Lora(base, a, b, None, form, scale, dropout)
    return dataclasses.replace(plain, lora_magnitude=jnp.linalg.norm(plain._merged(), axis=-1)) if dora else plain


def _norms(w_OI):
    """`[..., O]`, constants to the gradient (section 4.3); 1 for rows of zeros, such as those that pad a vocabulary."""
    norms = jax.lax.stop_gradient(jnp.linalg.norm(w_OI, axis=-1))
    return jnp.where(norms == 0, 1, norms)


def _renormalised(base, delta, factor, again):
    """`factor * (base + delta)`; `again` is the base's share of inputs with dropout, which reaches the correction of
    the base as it does in peft."""
    return (base + delta) * factor if again is None else base + (factor - 1) * again + factor * delta


def _along(values, letters: str, axes: str):
    """Values whose axes are `letters`, laid out along `axes`, with size 1 where those have more."""
    order = sorted(range(len(letters)), key=lambda i: axes.index(letters[i]))
    sizes = iter(values.transpose(order).shape)
    return values.transpose(order).reshape([next(sizes) if name in letters else 1 for name in axes])


def _dropped(x, rate: float, key):
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
