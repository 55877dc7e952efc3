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
from jaxllm.kernels.experts import grouped_matmul
from jaxllm.weights import seam
from jaxllm.weights.axes import Axes
from jaxllm.weights.form import Form, matrix_axes

STATIC = dict(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """`base + scale * lora_a lora_b`; with a magnitude, its outputs are renormalised (DoRA)."""

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
        return self.form.weight(self._merged(jnp.float32)).astype(dtype)

    def einsum(self, equation: str, x: jax.Array, *, dtype=None) -> jax.Array:
        """See `seam.einsum`."""
        if not self.form.fits(equation):
            if self.several:
                raise UserError(f"adapters by row do not go through {equation}; leave k_up and v_up out of the pattern")
            return jnp.einsum(equation, x, self.dense(x.dtype), preferred_element_type=dtype)
        base = seam.einsum(equation, x, self.base, dtype=dtype)
        assert not self.several or equation[0] == "B", equation
        h = _dropped(x, self.dropout, self.key)
        delta = self.form.leave(equation, self._delta(self.form.enter(equation, h)).astype(base.dtype))
        if self.lora_magnitude is None:
            return base + delta
        factor = self.form.leave(equation, self._factor(self.form.enter(equation, x).ndim).astype(base.dtype))
        if self.key is None or not self.dropout:
            return (base + delta) * factor
        # As in peft: dropout reaches the base's share of the renormalised weight, too.
        return base + delta * factor + (factor - 1) * seam.einsum(equation, h, self.base, dtype=dtype)

    def grouped_matmul(self, x_MD: jax.Array, sizes_E: jax.Array, *, block: int) -> jax.Array:
        """See `seam.grouped_matmul`."""
        if self.several:
            raise UserError("adapters by row do not reach experts; leave moe/** out of the pattern")
        if self.lora_magnitude is not None:
            w_EDF = jnp.swapaxes(self._merged(x_MD.dtype), -1, -2)
            return grouped_matmul(x_MD, w_EDF, sizes_E, block=block)
        base = seam.grouped_matmul(x_MD, self.base, sizes_E, block=block)
        x_MD = _dropped(x_MD, self.dropout, self.key)
        for part in (self.lora_a, self.lora_b):
            x_MD = grouped_matmul(x_MD, part.astype(x_MD.dtype), sizes_E, block=block)
        return base + self.scale * x_MD

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        """See `seam.take`: the rows of the table are the outputs."""
        base = seam.take(self.base, ids, dtype)
        a_IR, b_RO = self.lora_a, self.lora_b
        if self.several:
            picked = jnp.swapaxes(b_RO, -1, -2)[jnp.maximum(self.rows_B, 0)[:, None], ids]
            h = jnp.einsum("btr,bir->bti", picked, a_IR[jnp.maximum(self.rows_B, 0)])
            h = jnp.where((self.rows_B >= 0)[:, None, None], h, 0)
        else:
            h = jnp.einsum("...r,ir->...i", b_RO.T[ids], a_IR)
        rows = base + (self.scale * h).astype(dtype)
        if self.lora_magnitude is None:
            return rows
        factor = self._factor(1 + self.several)  # [O] or [B, O]
        picked = factor[jnp.arange(ids.shape[0])[:, None], ids] if self.several else factor[ids]
        return rows * picked[..., None].astype(dtype)

    def _delta(self, x):
        """`scale * x a b` for x `[E?, ..., I]`."""
        a_IR, b_RO = (part.astype(x.dtype) for part in (self.lora_a, self.lora_b))
        if not self.several:
            e = "e" if self.form.experts else ""
            h = jnp.einsum(f"{e}...i,{e}ir->{e}...r", x, a_IR)
            return self.scale * jnp.einsum(f"{e}...r,{e}ro->{e}...o", h, b_RO)
        chosen = jnp.maximum(self.rows_B, 0)
        h = jnp.einsum("b...r,bro->b...o", jnp.einsum("b...i,bir->b...r", x, a_IR[chosen]), b_RO[chosen])
        has_B = (self.rows_B >= 0).reshape(-1, *[1] * (h.ndim - 1))
        return jnp.where(has_B, self.scale * h, 0)

    def _factor(self, ndim: int):
        """DoRA's magnitude over the norm of the merged weight (a constant, section 4.3): `[E?, ..1.., O]`."""
        factor = self.lora_magnitude / jax.lax.stop_gradient(self._norms())
        if self.several:
            factor = jnp.where((self.rows_B >= 0)[:, None], factor[jnp.maximum(self.rows_B, 0)], 1)
        lead = factor.shape[:-1]
        return factor.reshape(*lead, *[1] * (ndim - 1 - len(lead)), factor.shape[-1])

    def _norms(self):
        w_OI = _base_matrix(self.base, self.form, jnp.float32)
        merged = w_OI + self.scale * jnp.swapaxes(self.lora_a @ self.lora_b, -1, -2)
        return jnp.linalg.norm(merged, axis=-1)

    def _merged(self, dtype):
        """`[E?, O, I]`"""
        w_OI = _base_matrix(self.base, self.form, jnp.float32)
        w_OI = w_OI + self.scale * jnp.swapaxes(self.lora_a @ self.lora_b, -1, -2)
        if self.lora_magnitude is not None:
            norm_O = jax.lax.stop_gradient(jnp.linalg.norm(w_OI, axis=-1))
            w_OI = w_OI * (self.lora_magnitude / norm_O)[..., None]
        return w_OI.astype(dtype)

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
    magnitude = jnp.linalg.norm(_base_matrix(base, form, jnp.float32), axis=-1) if dora else None
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    return Lora(base, a, b, magnitude, form, scale, dropout)


def _base_matrix(base, form: Form, dtype):
    dense = base if isinstance(base, jax.Array) else base.dense(dtype)
    return form.matrix(dense.astype(dtype))


def _dropped(x, rate: float, key):
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
