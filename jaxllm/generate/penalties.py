"""What a row's own text does to its logits: repetition, frequency and presence penalties; and its logit bias.

These need arrays of a number for each token of the vocabulary, which batches without them do not have: they run a
loop that was compiled without them.

Shapes: B batch, V vocab.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import SettingsError
from jaxllm.generate.params import SamplingParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """What the penalties and the bias of each row need."""

    prompt_BV: jax.Array
    """Whether the token is in the prompt."""
    counts_BV: jax.Array
    """How often it was made."""
    bias_BV: jax.Array
    """Added to its logit."""

    def apply(self, logits_BV: jax.Array, params: SamplingParams) -> jax.Array:
        """The logits after bias, repetition penalty, frequency and presence penalties, in this order."""
        x_BV = logits_BV + self.bias_BV
        repetition_B1 = params.repetition_penalty_B[:, None]
        penalised_BV = jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1)
        x_BV = jnp.where(self.prompt_BV | (self.counts_BV > 0), penalised_BV, x_BV)
        x_BV = x_BV - params.frequency_penalty_B[:, None] * self.counts_BV
        return x_BV - params.presence_penalty_B[:, None] * (self.counts_BV > 0)

    def count(self, token_B: jax.Array) -> "Edits":
        """With these tokens counted as made."""
        row_B = jnp.arange(len(token_B))
        return dataclasses.replace(self, counts_BV=self.counts_BV.at[row_B, token_B].add(1))


def make_edits(params: SamplingParams, prompts, biases: Sequence[Mapping[int, float]], vocab: int) -> Edits | None:
    """Of rows with these prompts and `{id: bias}`; None where no row has a penalty or a bias."""
    penalised = np.any(params.repetition_penalty_B != 1) | np.any(params.frequency_penalty_B != 0)
    if not (penalised or np.any(params.presence_penalty_B != 0) or any(biases)):
        return None
    shape = (len(prompts), vocab)
    prompt_BV, bias_BV = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for row, (prompt, bias) in enumerate(zip(prompts, biases, strict=True)):
        prompt_BV[row, np.asarray(prompt)] = True
        bias_BV[row, list(bias)] = list(bias.values())
    return Edits(prompt_BV, np.zeros(shape, np.int32), bias_BV)


def check_bias(bias, prompts: int, vocab: int) -> list[Mapping[int, float]]:
    """A bias for each prompt, from one for all, one for each, or None. Raises SettingsError for one that cannot be."""
    biases = [bias or {}] * prompts if bias is None or isinstance(bias, Mapping) else list(bias)
    if len(biases) != prompts:
        raise SettingsError(f"logit_bias: {len(biases)} for {prompts} prompts; give one {{id: bias}}, or one for each")
    for i, value in (item for bias in biases for item in bias.items()):
        if not (isinstance(i, int | np.integer) and 0 <= i < vocab):
            raise SettingsError(f"logit_bias: id {i!r} is outside the vocabulary of {vocab}")
        if not np.isfinite(value):
            raise SettingsError(f"logit_bias of id {i} is {value}: must be finite; banned_ids forbids a token")
    return biases
