"""Checks the result of a demo run: better than n-grams, and not so good that only a leak of the future explains it.

    python scripts/check_demo.py runs/demo

The n-grams are counted over the same tokens, on as many of them as the model has read; the best order counts. Exit
code 1 when the held-out bits per byte lie outside of the bounds.
"""

import json
import sys
from pathlib import Path

import numpy as np
from baselines import ngram_bits_per_byte, stores_of

from jaxllm.data.store import TokenStore

#: Large models reach about 0.5 bits per byte on source code; a few minutes of a small one can not, unless it cheats.
FLOOR = 0.5


def portion(store: TokenStore, tokens: int) -> TokenStore:
    """Random documents of about `tokens` tokens together."""
    order = np.random.default_rng(0).permutation(store.documents)
    enough = int(np.searchsorted(np.cumsum(store.lengths[order]), tokens)) + 1
    return store.select(np.sort(order[:enough]))


def main(run: Path) -> int:
    train, heldout, _ = stores_of(run)
    summary = json.loads((run / "summary.json").read_text())
    read, found = portion(train, summary["tokens"]), summary["bits_per_byte"]
    bounds = {order: ngram_bits_per_byte(read, heldout, order) for order in (1, 2, 3)}
    best = min(bounds, key=bounds.get)
    ok = FLOOR < found < bounds[best]
    print(
        f"held out: {found:.4f} bits per byte after {summary['tokens']:,} tokens; floor {FLOOR}, "
        f"{best}-gram on {read.tokens:,} tokens {bounds[best]:.4f}: {'ok' if ok else 'FAILED'}"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
