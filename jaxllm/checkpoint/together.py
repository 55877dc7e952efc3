"""What the processes of a run must agree on before one of them acts on it: a collective that only some of them enter
never ends."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.errors import CheckpointError, DataError, ResourceError, SettingsError, UserError

KINDS = {kind.__name__: kind for kind in (CheckpointError, DataError, ResourceError, SettingsError)}


def first_says(ask: Callable[[], Any]) -> Any:
    """What `ask` returns in the first process (JSON), in all of them; a UserError there is raised in all.

    Asks nothing of jax where there is one process. `ask` must not call a collective itself.
    """
    if not jax.distributed.is_initialized():
        return ask()
    answer, raised = {}, None
    if jax.process_index() == 0:
        try:
            answer = {"found": ask()}
        except UserError as error:
            answer, raised = {"error": str(error), "kind": type(error).__name__}, error
    answer = _broadcast(answer)
    if "error" in answer:
        raise raised or KINDS.get(answer["kind"], UserError)(answer["error"])
    return answer["found"]


def _broadcast(value: Any) -> Any:
    """JSON of the first process, in all of them."""
    data = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.frombuffer(data, np.uint8) if data else np.zeros(size, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())


def check_same(values: Mapping[str, str]) -> None:
    """Raises SettingsError, in every process, where one has other values than the first; `{what it is: value}`."""
    if not jax.distributed.is_initialized():
        return
    sums = [hashlib.sha256(value.encode()).digest() for value in values.values()]
    found = multihost_utils.process_allgather(np.frombuffer(b"".join(sums), np.uint8).reshape(len(sums), -1))
    for process, row in enumerate(found):
        differ = [name for name, a, b in zip(values, row, found[0], strict=True) if not np.array_equal(a, b)]
        if differ:
            raise SettingsError(
                f"process {process} has another {' and another '.join(differ)} than process 0; "
                "give every process the same settings and the same files"
            )
