"""The batch that language-model objectives read."""

from dataclasses import dataclass

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens, a pytree of (B, T) arrays; see pack.Row for the meaning of each."""

    tokens_BT: jax.Array | np.ndarray
    """int32"""
    targets_BT: jax.Array | np.ndarray
    """int32"""
    mask_BT: jax.Array | np.ndarray
    """float32, 0 where nothing is predicted"""
    positions_BT: jax.Array | np.ndarray
    """int32"""
    segments_BT: jax.Array | np.ndarray
    """int32, 0 is padding"""
    reference_BT: jax.Array | np.ndarray | None = None
    """float32: log-probabilities of the targets under a frozen model, where an objective wants them"""
    top_ids_BTN: jax.Array | None = None
    """int32: a teacher's most likely tokens"""
    top_logprobs_BTN: jax.Array | None = None
    """float32: and their log-probabilities"""
