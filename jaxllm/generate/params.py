"""How each row samples: one array for each parameter, so that a new number never compiles anything.

Shapes: B batch.
"""

import dataclasses
import math
import numbers

import jax
import numpy as np

from jaxllm.errors import SettingsError, nearest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How each row samples; made by `make_sampling`, applied in the order of these fields by `sample`."""

    repetition_penalty_B: jax.Array
    """Divides positive and multiplies negative logits of tokens in the prompt or made (Keskar et al. 2019,
    arXiv 1909.05858, section 4.1; signs as in transformers); 1 does nothing."""
    frequency_penalty_B: jax.Array
    """Subtracted from the logit of a token for each time that it was made (OpenAI's definition)."""
    presence_penalty_B: jax.Array
    """Subtracted from the logits of tokens that were made (OpenAI's definition)."""
    temperature_B: jax.Array
    """Divides the logits; 0 takes the most likely token."""
    top_k_B: jax.Array
    """Keep this many of the most likely tokens; 0 keeps all (Fan et al. 2018, arXiv 1805.04833)."""
    top_p_B: jax.Array
    """Keep the fewest most likely tokens whose probability reaches this (Holtzman et al. 2019, arXiv 1904.09751)."""
    min_p_B: jax.Array
    """Keep tokens of at least this share of the largest probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    typical_p_B: jax.Array
    """Keep the fewest tokens of surprise nearest to the entropy whose probability reaches this (Meister et al. 2022,
    arXiv 2202.00666)."""
    seed_B: jax.Array
    """Root of the row's randomness."""


def _count(least: int, limit: int = 2**31):
    return lambda x: x == int(x) and least <= x < limit


_NUMBER = "a finite number; 0 does nothing", lambda x: True
_SHARE = "above 0 and at most 1 (keeps all)", lambda x: 0 < x <= 1
#: Name of a parameter -> its dtype, its default, what it may be, and the check.
PARAMETERS = {
    "repetition_penalty": (np.float32, 1.0, "above 0; 1 does nothing", lambda x: x > 0),
    "frequency_penalty": (np.float32, 0.0, *_NUMBER),
    "presence_penalty": (np.float32, 0.0, *_NUMBER),
    "temperature": (np.float32, 1.0, "0 (greedy) or more, and finite", lambda x: x >= 0),
    "top_k": (np.int32, 0, "an integer from 0 (keeps all)", _count(0)),
    "top_p": (np.float32, 1.0, *_SHARE),
    "min_p": (np.float32, 0.0, "from 0 (keeps all) to 1", lambda x: 0 <= x <= 1),
    "typical_p": (np.float32, 1.0, *_SHARE),
    "seed": (np.uint32, 0, "an integer from 0 to 2**32 - 1", _count(0, 2**32)),
}
#: The same for what bounds a row's length.
LENGTHS = {
    "max_tokens": (np.int32, None, "an integer from 1", _count(1)),
    "min_tokens": (np.int32, 0, "an integer from 0", _count(0)),
}


def make_sampling(rows: int, **given) -> SamplingParams:
    """Parameters of `rows` rows, by their names in PARAMETERS: one number for all rows or a sequence with one for each.

    Rows with the same seed draw the same noise at the same position: a row's tokens are those it gets alone.
    Raises SettingsError for an unknown name, a number out of its range, or another count of them.
    """
    for name in given:
        if name not in PARAMETERS:
            raise SettingsError(f"unknown option {name}{nearest(name, PARAMETERS)}")
    defaults = {name: default for name, (_, default, *_) in PARAMETERS.items()}
    return SamplingParams(**{f"{name}_B": column(name, x, rows) for name, x in (defaults | given).items()})


def column(name: str, value, rows: int) -> np.ndarray:
    """One value for each row, from one number or a sequence. Raises SettingsError as `make_sampling` does."""
    dtype, _, allowed, check = (PARAMETERS | LENGTHS)[name]
    values = np.asarray(value).tolist() if np.ndim(value) else [value] * rows
    if len(values) != rows:
        raise SettingsError(f"{name}: {len(values)} values for {rows} prompts; give one number, or one for each prompt")
    for x in values:
        if not (isinstance(x, numbers.Real) and math.isfinite(x) and check(x)):
            raise SettingsError(f"{name}={x}: must be {allowed}")
    return np.asarray(values, dtype)
