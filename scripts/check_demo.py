"""Checks the result of a demo run: better than an n-gram, and not so good that only a leak of the future explains it.

    python scripts/check_demo.py runs/demo

Exit code 1 when the held-out bits per byte lie outside of the bounds.
"""

import json
import sys
from pathlib import Path

from baselines import ngram_bits_per_byte, stores_of

#: The model must beat a bigram over the same tokens, counted on all of the training text.
ORDER = 2
#: Large models reach about 0.5 bits per byte on source code; a few minutes of a small one can not, unless it cheats.
FLOOR = 0.5


def main(run: Path) -> int:
    train, heldout, _ = stores_of(run)
    bound = ngram_bits_per_byte(train, heldout, ORDER)
    found = json.loads((run / "summary.json").read_text())["bits_per_byte"]
    ok = FLOOR < found < bound
    print(f"held out: {found:.4f} bits per byte; floor {FLOOR}, {ORDER}-gram {bound:.4f}: {'ok' if ok else 'FAILED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
