"""Attention behind one signature: which kernel computes it where, and why.

Every kernel is held against `reference.py`. Shapes: B batch, T query position, S key position, N query heads, K kv
heads, H head dim.
"""

import functools
import logging

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxllm.errors import SettingsError
from jaxllm.kernels.backend import platform
from jaxllm.kernels.blockwise import blockwise
from jaxllm.kernels.cudnn import cudnn, lacks
from jaxllm.kernels.reference import NO_HEADS, SAVED, Form, PerHead, Where, reference
from jaxllm.kernels.splash import LANES, splash
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
) -> jax.Array:
    """`o_BTNH` by the kernel named `kind`, or by the best one for the mesh of `sharding` with "auto".

    All but "reference" are for self-attention: key s lies at index s of the same rows as the queries.
    Raises SettingsError for a kernel that the mesh or the kind of attention lacks.
    """
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
    if heads.slopes_N is not None:
        return "blockwise", "splash attention has no ALiBi"
    if T < LANES:
        return "blockwise", f"rows of {T} tokens, and splash attention works on blocks of {LANES}"
    return "splash", "on TPU"


def _check(kind: str, q_BTNH, v_BKSH, form: Form, where: Where, heads: PerHead, sharding: Sharding | None) -> None:
    if kind == "reference":
        return
    if _split(sharding):
        raise SettingsError(
            f"kernels.attention={kind} needs whole sequences, and parallel.context={sharding.mesh.shape['context']} "
            "splits them; set kernels.attention=auto"
        )
    backend = {"splash": "tpu", "cudnn": "gpu"}.get(kind, platform())
    if backend != platform():
        raise SettingsError(
            f"kernels.attention={kind} is for {backend.upper()}, and this mesh is of {platform()}; set it to auto"
        )
    if kind == "cudnn" and (missing := lacks(q_BTNH, v_BKSH, form, where, heads, sharding)):
        raise SettingsError(f"kernels.attention=cudnn: {missing}; set kernels.attention=auto or blockwise")
    if kind == "splash" and heads.slopes_N is not None:
        raise SettingsError("kernels.attention=splash has no ALiBi; set kernels.attention=auto or blockwise")


def _split(sharding: Sharding | None) -> bool:
    return sharding is not None and sharding.mesh.shape["context"] > 1


@functools.cache
def _say(line: str) -> None:
    """Once in a process: every layer asks."""
    log.info(line)
