"""Log-probabilities of a frozen reference, computed once before training and kept beside the run.

They do not depend on how rows are packed, so one number for each token of a store serves every epoch.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxllm.checkpoint import load, locate, manifest, read_meta
from jaxllm.checkpoint.models import model_of, tokenizer_folder
from jaxllm.data.loader import Loader
from jaxllm.data.pack import Rows
from jaxllm.data.shards import digest
from jaxllm.data.store import TokenStore
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.errors import CheckpointError, SettingsError
from jaxllm.hf.open import open_published
from jaxllm.model.build import Model, Params, check_tokens
from jaxllm.objectives.logprobs import token_logprobs
from jaxllm.sharding import Sharding
from jaxllm.train.rows import outputs
from jaxllm.train.step import traced_on

FOLDER = "reference"


def frozen_model(path: str, sharding: Sharding, tokenizer: Tokenizer, what: str, length: int) -> tuple[Model, Params]:
    """The model at `path`, to be used as it is on rows of `length`.

    Raises SettingsError where it has another tokenizer, or fewer learned positions.
    """
    if (published := open_published(path)) is not None:
        (model, params), theirs = published.load(sharding), published.tokenizer()
    else:
        model, theirs = model_of(read_meta(path)[1], path, sharding), Tokenizer.load(tokenizer_folder(path))
        params = load(path, model.abstract).state
    if theirs.hash != tokenizer.hash:
        raise SettingsError(
            f"{what}={path} has another tokenizer (hash {theirs.hash[:12]}, here {tokenizer.hash[:12]}): its "
            "probabilities are of other tokens; choose a model with the same one"
        )
    check_tokens(model.config, (), length)
    return model, params


def version_of(path: str) -> list:
    """What tells the weights of a model from those of another one at the same path."""
    if open_published(path) is not None:
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    folder, step = locate(path, read_meta(path)[0])
    return [step, digest(manifest.read(folder / str(step)))]  # checksums of the arrays among the rest


def reference_of(model: Model, params: Params, store: TokenStore, *, length: int, batch: int, truncate) -> np.ndarray:
    """float32 `[tokens of the store]`: the log-probability of each token after those before it in its conversation.

    0 where no row holds the token as a target.
    """
    rows = Rows(store, length, shuffle=False, truncate=truncate)
    found = np.zeros(store.tokens + 1, np.float32)  # the last one takes what is no target
    step = jax.jit(traced_on(model, lambda params, batch: outputs(model, token_logprobs, params, batch)))
    loader = Loader(rows, batch, stop=rows.per_epoch, prefetch=1)
    for b, one in enumerate(loader):
        logprobs_BT = np.asarray(step(params, model.sharding.batch(one)))
        for i, r in enumerate(range(b * batch, min((b + 1) * batch, rows.per_epoch))):
            found[rows.places(r)] = logprobs_BT[i]
    loader.close()
    return found[:-1]


def save_reference(folder: Path, arrays: Mapping[str, np.ndarray], fingerprint: str) -> None:
    """Writes them into a run folder, with the fingerprint of the data that they are of."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        temporary = folder / FOLDER / f"{name}.tmp.npy"
        np.save(temporary, array)
        temporary.replace(folder / FOLDER / f"{name}.npy")
    (folder / FOLDER / "data").write_text(fingerprint + "\n", encoding="utf-8")


def load_reference(folder: Path, stores: Mapping[str, TokenStore], fingerprint: str) -> dict[str, np.ndarray]:
    """What `save_reference` wrote. Raises CheckpointError where it is missing or of other data."""
    found = {}
    for name, store in stores.items():
        path = folder / FOLDER / f"{name}.npy"
        try:
            said = (folder / FOLDER / "data").read_text(encoding="utf-8").strip()
            found[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: the reference's log-probabilities cannot be read ({error}); put the folder back, or start a "
                "new run"
            ) from None
        if said != fingerprint or found[name].shape != (store.tokens,):
            raise CheckpointError(f"{path} holds log-probabilities of other data; put the run's own folder back")
    return found
