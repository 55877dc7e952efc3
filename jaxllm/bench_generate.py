"""`jaxllm bench generate MODEL ...`: tokens/s of prefill and of decoding, on random tokens, greedy.

Prefill: 512 tokens a row into an empty cache. Decoding: 128 tokens a row after a prompt of 16; the time of a call that
makes one token is subtracted. Both after a first call that compiles, the fastest of three: the machine's noise only
ever adds. Several models are measured in turn, three rounds, and compared with the first: medians of the ratios within
a round.
"""

import json as json_format
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxllm import api
from jaxllm.generate import decode, tokens

PREFILL, PROMPT, DECODE, REPEATS = 512, 16, 128, 3


def bench_generate(
    paths: Sequence[str], *, batches: Sequence[int] = (1, 8), dtype: str = "float32", json: bool = False
) -> list[dict]:
    """Measures each batch size, prints a line (with `json` as JSON) for each model and returns the rows.

    `dtype`: of published models' weights. Raises UserError as `load` does.
    """
    models, rows = [api.load(path) if dtype == "float32" else api.load(path, dtype=dtype) for path in paths], []
    for batch in batches:
        for path, row in zip(paths, _measured(models, batch), strict=True):
            rows.append({"model": path, "batch": batch, **row})
            print(json_format.dumps(rows[-1]) if json else _line(rows[-1], alone=len(paths) == 1), flush=True)
    return rows


def _measured(models: Sequence[api.Loaded], batch: int) -> list[dict]:
    """Tokens/s of each model, and of all but the first also how many times those of the first."""
    calls = [_calls(loaded.model, loaded.decoding, batch) for loaded in models]
    for call in (call for each in calls for call in each):
        call()  # compiles
    times = np.array([[[_seconds(call) for call in each] for each in calls] for _ in range(REPEATS)])
    found = []
    for i in range(len(models)):
        prefill, long, short = times[:, i].min(0)
        row = {"prefill": batch * PREFILL / prefill, "decode": batch * DECODE / (long - short)}
        if i:
            decoding = times[:, :, 1] - times[:, :, 2]
            row["prefill_ratio"] = statistics.median(times[:, 0, 0] / times[:, i, 0])
            row["decode_ratio"] = statistics.median(decoding[:, 0] / decoding[:, i])
        found.append(row)
    return found


def _calls(model, params, batch: int) -> tuple[Callable, Callable, Callable]:
    """A prefill, many tokens and one token."""
    long, short = _random(model, batch, PREFILL + 1), _random(model, batch, PROMPT)

    def generate(count: int):
        tokens.generate(model, params, short, max_tokens=count, temperature=0.0)

    return (  # the last token of a prompt is the first one decoded
        lambda: jax.block_until_ready(decode.prefill(model, params, long, batch, np.ones(batch))),
        lambda: generate(DECODE + 1),
        lambda: generate(1),
    )


def _random(model, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(5, model.config.vocab, (batch, length)).tolist()


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _line(row: dict, *, alone: bool) -> str:
    ratios = {key: f" ({row[f'{key}_ratio']:.2f}x)" if f"{key}_ratio" in row else "" for key in ("prefill", "decode")}
    speeds = ", ".join(f"{key} {row[key]:,.1f} tokens/s{ratio}" for key, ratio in ratios.items())
    return f"batch {row['batch']}: {speeds}" + f"  {row['model']}" * (not alone)
