"""One dial: a depth gives the width, the tokens, the batch and the learning rate of a compute-optimal run.

Plain arithmetic, no jax. Sources:
  Kaplan et al. 2020, "Scaling laws for neural language models" (arXiv:2001.08361)
  Hoffmann et al. 2022, "Training compute-optimal large language models" (arXiv:2203.15556)
  Bi et al. 2024, "DeepSeek LLM" (arXiv:2401.02954)
  Ainslie et al. 2023, "GQA" (arXiv:2305.13245); Shazeer 2020, "GLU variants improve transformer" (arXiv:2002.05202)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.errors import SettingsError, nearest

#: Compute (FLOPs) of the runs behind the learning-rate and batch laws (Bi et al. 2024, section 3.1). They count
#: attention and leave the embedding out; at 6ND the laws move by a few percent.
FITTED = (1e17, 2e19)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one quantity follows from those above it."""

    name: str
    formula: str
    source: str
    value: Callable[[Mapping[str, Any]], Any]


def _parameters(v: Mapping[str, Any]) -> int:
    """Attention, gated feed-forward and two norms in each layer; the final norm, the embedding and the head."""
    attention = 2 * v["embed"] * v["head"] * (v["heads"] + v["kv_heads"])
    layer = attention + 3 * v["embed"] * v["ffw"] + 2 * v["embed"]
    return v["depth"] * layer + v["embed"] + (1 if v["tied"] else 2) * v["vocab"] * v["embed"]


def _heads(v: Mapping[str, Any]) -> int:
    return max(1, v["embed"] // v["head"])


RULES = (
    Rule(
        "embed",
        "64 * depth, up to a multiple of 128",
        "aspect ratio 64, in the flat range of Kaplan et al. 2020, figure 5; 128 for an even number of heads",
        lambda v: 128 * math.ceil(v["depth"] / 2),
    ),
    Rule("head", "64", "our choice: the usual size at these widths", lambda v: 64),
    Rule("heads", "max(1, embed // head)", "our choice: together as wide as the model", _heads),
    Rule(
        "kv_heads",
        "heads / 2, or heads where odd",
        "grouped-query attention, Ainslie et al. 2023; groups of 2 are our choice",
        lambda v: v["heads"] // (1 if v["heads"] % 2 else 2),
    ),
    Rule(
        "ffw",
        "8/3 * embed, up to a multiple of 64",
        "gated feed-forward with the size of a plain one of 4 * embed, Shazeer 2020, section 2",
        lambda v: 64 * math.ceil(8 * v["embed"] / (3 * 64)),
    ),
    Rule("params", "all weights, embedding included", "N of Hoffmann et al. 2022", _parameters),
    Rule("tokens", "20 * params", "D of Hoffmann et al. 2022, table 3", lambda v: 20 * v["params"]),
    Rule(
        "flops",
        "6 * params * tokens",
        "C = 6ND, Kaplan et al. 2020, section 2.1",
        lambda v: 6.0 * v["params"] * v["tokens"],
    ),
    Rule("lr", "0.3118 * flops^-0.1250", "Bi et al. 2024, eq. 1", lambda v: 0.3118 * v["flops"] ** -0.1250),
    Rule(
        "batch_tokens",
        "0.2920 * flops^0.3271",
        "Bi et al. 2024, eq. 1",
        lambda v: max(1, round(0.2920 * v["flops"] ** 0.3271)),
    ),
    Rule(
        "steps",
        "tokens / batch_tokens, rounded up",
        "one pass over the tokens",
        lambda v: math.ceil(v["tokens"] / v["batch_tokens"]),
    ),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A compute-optimal run. Sizes in elements, `tokens` and `batch_tokens` in tokens, `flops` for the whole run."""

    depth: int
    vocab: int
    tied: bool
    embed: int
    head: int
    heads: int
    kv_heads: int
    ffw: int
    params: int
    tokens: int
    flops: float
    lr: float
    batch_tokens: int
    steps: int
    by_hand: frozenset[str] = frozenset()

    def derivation(self) -> str:
        """One line for each quantity: value, formula, source."""
        lines = [f"depth = {self.depth}, vocab = {self.vocab}, {'tied' if self.tied else 'untied'} embeddings"]
        for rule in RULES:
            value = getattr(self, rule.name)
            text = f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
            why = "set by hand" if rule.name in self.by_hand else f"{rule.formula}  [{rule.source}]"
            lines.append(f"{rule.name:<12} = {text:>16}  {why}")
        if not FITTED[0] <= self.flops <= FITTED[1] and not {"lr", "batch_tokens"} <= self.by_hand:
            lines.append(
                f"note: lr and batch_tokens were fitted on runs of {FITTED[0]:.0e} to {FITTED[1]:.0e} FLOPs; "
                f"{self.flops:.1e} is an extrapolation"
            )
        return "\n".join(lines)


def compute_optimal(depth: int, vocab: int, *, tied: bool = True, **by_hand: float) -> Scale:
    """The compute-optimal run of a depth; a quantity set by hand (`embed=512`) changes all that follow from it.

    Raises SettingsError for a size below 1, an unknown quantity, or kv heads that do not divide the heads.
    """
    known = [rule.name for rule in RULES]
    for name, value in {"depth": depth, "vocab": vocab, **by_hand}.items():
        if name not in ("depth", "vocab", *known):
            raise SettingsError(f"unknown quantity {name}={value!r}{nearest(name, known)}")
        if not value > 0 or (name not in ("lr", "flops") and value != int(value)):
            raise SettingsError(f"{name}={value!r}: must be a whole number above 0 (lr and flops: any number above 0)")
    values: dict[str, Any] = {"depth": depth, "vocab": vocab, "tied": tied}
    for rule in RULES:
        values[rule.name] = by_hand[rule.name] if rule.name in by_hand else rule.value(values)
    if values["heads"] % values["kv_heads"]:
        raise SettingsError(f"heads={values['heads']} is not a multiple of kv_heads={values['kv_heads']}")
    return Scale(**values, by_hand=frozenset(by_hand))
