"""Compares a model's logits with the reference's, and reports the largest error and where it is.

T positions, V vocab.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.errors import DataError
from jaxllm.parity import rope
from jaxllm.parity.families import fill
from jaxllm.parity.folder import Folder
from jaxllm.parity.reference import forward

#: Largest error of float32 compute, as a part of the largest logit.
TOLERANCE = 1e-4

Logits = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """How far the logits of one stretch of text are from the reference's."""

    name: str
    #: Largest |ours - reference| over the largest |reference|; infinite where ours is not a number.
    error: float
    #: Position and token id of that error.
    position: int
    token: int
    #: Part of the positions whose most likely token is the same.
    agreement: float
    #: exp of the mean negative log-likelihood of each token but the first: ours and the reference's.
    perplexity: tuple[float, float]
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance


def compare(name: str, ours_TV, reference_TV, ids, start: int = 0, tolerance: float = TOLERANCE) -> Comparison:
    """Compares logits `[T, V]` of ids `[T]`, the first at position `start`. Raises DataError for different shapes."""
    ours, reference = np.asarray(ours_TV, np.float64), np.asarray(reference_TV, np.float64)
    if ours.shape != reference.shape:
        raise DataError(f"{name}: logits of shape {ours.shape}, but the reference's are {reference.shape}")
    error = np.nan_to_num(np.abs(ours - reference), nan=np.inf)
    t, token = np.unravel_index(error.argmax(), error.shape)
    return Comparison(
        name,
        float(error[t, token] / np.abs(reference).max()),
        start + int(t),
        int(token),
        float(np.mean(ours.argmax(-1) == reference.argmax(-1))),
        (perplexity(ours, ids), perplexity(reference, ids)),
        tolerance,
    )


def perplexity(logits_TV: np.ndarray, ids) -> float:
    """exp of the mean negative log-likelihood of ids[1:], each given those before it."""
    logits, targets = logits_TV[:-1], np.asarray(ids)[1:]
    peak = logits.max(-1)
    total = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
    return float(np.exp(np.mean(total - np.take_along_axis(logits, targets[:, None], -1)[:, 0])))


def compare_all(name: str, ours: Logits, reference: Logits, ids, starts: Sequence[int]) -> list[Comparison]:
    """A comparison for each start position; both functions are (ids, start) -> logits `[T, V]`."""
    rows = []
    for start in starts:
        where = f"{name}, positions {start} to {start + len(ids) - 1}"
        rows.append(compare(where, ours(ids, start), reference(ids, start), ids, start))
    return rows


def starts(config: dict, length: int) -> tuple[int, ...]:
    """Where to put a text of `length`: the beginning, and past the context before scaling, or the context's end."""
    c, traits = fill(config)
    if traits is None:
        return (0, c["n_positions"] - length)
    spec = rope.parameters(c, "full_attention" if "rope_local_base_freq" in c else None)
    scaled = spec["type"] != "default"
    return (0, spec["context"] if scaled else max(spec["longest"] - length, 0))


def table(rows: Sequence[Comparison]) -> str:
    """The comparisons as text, one in a line."""
    lines = [f"{'':<44} {'error':>8}  {'position':>8} {'token':>7}  {'same best':>9}  {'perplexity (reference)'}"]
    for row in rows:
        best = f"{100 * row.agreement:.1f} %"
        ours, theirs = row.perplexity
        verdict = "" if row.holds else f"  over {row.tolerance:g}"
        lines.append(
            f"{row.name:<44} {row.error:8.1e}  {row.position:8d} {row.token:7d}  {best:>9}  "
            f"{ours:.4f} ({theirs:.4f}){verdict}"
        )
    return "\n".join(lines)


def reference_logits(folder: Folder, ids, start: int = 0, rows=None) -> np.ndarray:
    """The reference's logits `[T, V]` for a published folder; see `reference.forward`."""
    return forward(folder.config, folder, ids, start, rows)
