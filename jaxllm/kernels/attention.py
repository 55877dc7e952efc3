"""Attention behind one signature: which kernel computes it where, and why.

Every kernel is held against `reference.py`. Shapes: B batch, T query position, S key position, N query heads, K kv
heads, H head dim.
"""

import functools
import logging

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.errors import SettingsError
from jaxllm.kernels import ring as rings
from jaxllm.kernels.backend import platform
from jaxllm.kernels.blockwise import blockwise
from jaxllm.kernels.cudnn import cudnn, lacks
from jaxllm.kernels.reference import NO_HEADS, SAVED, Form, PerHead, Where, reference
from jaxllm.kernels.splash import LANES, fits, splash
from jaxllm.sharding import Sharding

__all__ = ["Form", "PerHead", "Where", "attention"]

log = logging.getLogger("jaxllm")


def attention(
    q_BTNH,
    k_BKSH,
    v_BKSH,
    form: Form,
    where: Where,
    heads: PerHead = NO_HEADS,
    *,
    kind: str,
    sharding: Sharding | None = None,
    ring: bool = False,
) -> jax.Array:
    """`o_BTNH` by the kernel named `kind`, or by the best one for the mesh of `sharding` with "auto".

    Where devices hold parts of a row each (`Sharding.across`), keys and values are gathered, or travel in a ring.

    All but "reference" are for self-attention: key s lies at index s of the same rows as the queries.
    Raises SettingsError for a kernel that the mesh or the kind of attention lacks.
    """
    if sharding is not None and sharding.across("context"):
        return _across(q_BTNH, k_BKSH, v_BKSH, form, where, heads, kind, sharding, ring)
    if kind != "auto" and _split(sharding):  # evaluations and comparisons in hand look from outside
        _say(f"attention: reference for what is not a step of training (parallel.context), not {kind}")
        kind = "reference"
    if kind == "auto":
        kind, why = _best(q_BTNH, v_BKSH, form, where, heads, sharding)
        _say(f"attention: {kind} ({why})")
    else:
        _check(kind, q_BTNH, v_BKSH, form, where, heads, sharding)
    if kind == "splash":
        return splash(q_BTNH, k_BKSH, v_BKSH, form, where, heads, sharding=sharding)
    if kind == "cudnn":
        return cudnn(q_BTNH, k_BKSH, v_BKSH, form, where, heads, sharding=sharding)
    if kind == "blockwise":
        return blockwise(q_BTNH, k_BKSH, v_BKSH, form, where, heads)
    return checkpoint_name(reference(q_BTNH, k_BKSH, v_BKSH, form, where, heads), SAVED)


def _across(q_BTNH, k_BKSH, v_BKSH, form: Form, where: Where, heads: PerHead, kind, sharding: Sharding, in_ring: bool):
    """Attention of the queries that this device holds to all keys of their rows."""
    parts = sharding.mesh.shape["context"]
    length = q_BTNH.shape[1] * parts
    if in_ring:
        if kind not in ("auto", "blockwise"):
            raise SettingsError(f"kernels.attention={kind}: ring attention is blockwise; set it to auto")
        _say("attention: blockwise, keys and values in a ring (kernels.context=ring)")
        halves = length % (2 * parts) == 0
        return rings.ring(q_BTNH, k_BKSH, v_BKSH, form, where, heads, axis="context", halves=halves)
    own = sharding.activation(("batch", "kv_heads", None, None), k_BKSH.shape)
    k_BKSH, v_BKSH = (sharding.by_part(lambda x: sharding.whole(x, 2), x, own) for x in (k_BKSH, v_BKSH))
    positions, segments = (None if x is None else sharding.whole(x) for x in (where[1], where[3]))
    where = Where(where.q_positions_BT, positions, where.q_segments_BT, segments)
    missing = _splash_lacks(heads) or (
        None if fits(length, parts) else f"rows of {length} tokens in {2 * parts} pieces"
    )
    if kind == "splash" and (missing or platform() != "tpu"):
        raise SettingsError(f"kernels.attention=splash: {missing or f'this mesh is of {platform()}'}; set it to auto")
    if kind in ("auto", "splash") and platform() == "tpu" and not missing:
        _say("attention: splash, keys and values gathered (parallel.context)")
        return splash(q_BTNH, k_BKSH, v_BKSH, form, where, heads, sharding=sharding, parts=parts)
    if kind == "reference":
        return checkpoint_name(reference(q_BTNH, k_BKSH, v_BKSH, form, where, heads), SAVED)
    if kind == "cudnn":
        raise SettingsError(f"kernels.attention=cudnn needs whole rows, and parallel.context={parts} splits them")
    _say(f"attention: blockwise, keys and values gathered ({missing or f'parallel.context on {platform()}'})")
    return blockwise(q_BTNH, k_BKSH, v_BKSH, form, where, heads, aligned=False)


def _splash_lacks(heads: PerHead) -> str | None:
    return "splash attention has no ALiBi" if heads.slopes_N is not None else None


def _best(q_BTNH, v_BKSH, form: Form, where: Where, heads: PerHead, sharding: Sharding | None) -> tuple[str, str]:
    """The kernel and the reason."""
    if _split(sharding):
        return "reference", "parallel.context splits the sequences"
    T = q_BTNH.shape[1]
    if platform() == "gpu":
        missing = lacks(q_BTNH, v_BKSH, form, where, heads, sharding)
        if T < LANES:
            missing = missing or f"rows of {T} tokens are short"
        return ("blockwise", missing) if missing else ("cudnn", "on GPU")
    if platform() != "tpu":
        return "blockwise", f"on {platform()}"
    if missing := _splash_lacks(heads):
        return "blockwise", missing
    if T < LANES:
        return "blockwise", f"rows of {T} tokens, and splash attention works on blocks of {LANES}"
    return "splash", "on TPU"


def _check(kind: str, q_BTNH, v_BKSH, form: Form, where: Where, heads: PerHead, sharding: Sharding | None) -> None:
    if kind == "reference":
        return
    backend = {"splash": "tpu", "cudnn": "gpu"}.get(kind, platform())
    if backend != platform():
        raise SettingsError(
            f"kernels.attention={kind} is for {backend.upper()}, and this mesh is of {platform()}; set it to auto"
        )
    if kind == "cudnn" and (missing := lacks(q_BTNH, v_BKSH, form, where, heads, sharding)):
        raise SettingsError(f"kernels.attention=cudnn: {missing}; set kernels.attention=auto or blockwise")
    if kind == "splash" and (missing := _splash_lacks(heads)):
        raise SettingsError(f"kernels.attention=splash: {missing}; set kernels.attention=auto or blockwise")


def _split(sharding: Sharding | None) -> bool:
    return sharding is not None and sharding.mesh.shape["context"] > 1


@functools.cache
def _say(line: str) -> None:
    """Once in a process: every layer asks."""
    log.info(line)
