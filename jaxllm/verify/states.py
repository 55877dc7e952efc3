"""`python -m jaxllm.verify.states FOLDER train RUN.yaml [KEY=VALUE ...]`: notes the bits of all it saves and restores.

FOLDER gets `saved-<step>.json` and `restored-<step>.json`: a hash for each array, as it is with the parts of all
devices and processes put together.
"""

import hashlib
import json
import sys
from pathlib import Path


def hashes(state) -> dict[str, str]:
    """`{path: sha256}`; all processes have to ask, and all get the same."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from jaxllm import tree

    def whole(x) -> np.ndarray:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))

    arrays = {path: whole(x) for path, x in tree.flatten(state).items()}
    return {
        path: hashlib.sha256(f"{x.dtype}{x.shape}".encode() + x.tobytes()).hexdigest() for path, x in arrays.items()
    }


def watch(folder: Path) -> None:
    """From now on this process notes what it saves and restores."""
    from jaxllm.checkpoint import Checkpoints

    save, restore = Checkpoints.save, Checkpoints.restore

    def note(kind: str, step: int, state) -> None:
        found = json.dumps(hashes(state))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kind}-{step}.json").write_text(found)

    def noted_save(self, step, state, *args, **named):
        note("saved", step, state)
        return save(self, step, state, *args, **named)

    def noted_restore(self, *args, **named):
        restored = restore(self, *args, **named)
        if restored is not None:
            note("restored", restored.step, restored.state)
        return restored

    Checkpoints.save, Checkpoints.restore = noted_save, noted_restore


def main(argv: list[str]) -> int:
    from jaxllm.train.load import load_run
    from jaxllm.train.loop import train

    folder, _, settings, *overrides = argv
    watch(Path(folder))
    train(load_run(settings, overrides)[0], quiet=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
