"""Row 7: a state that is not the one that was saved, and a loss that depends on the devices, are found."""

import json

import pytest

from jaxllm.verify import meshes
from jaxllm.verify.lab import MODEL, Lab

#: Restored weights are off by the least that can be: a bit of one of them.
FAULT = """
import sys
from jaxllm.checkpoint import Checkpoints
restore = Checkpoints.restore
def other(self, *args, **named):
    found = restore(self, *args, **named)
    if found is None:
        return found
    import dataclasses, jax
    from jaxllm import tree
    state = found.state
    params = tree.map_with_path(lambda path, x: x * (1 + 2e-7) if path.endswith("norm/scale") else x, state.params)
    params = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    return found._replace(state=dataclasses.replace(state, params=params))
Checkpoints.restore = other
from jaxllm.verify.states import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_bit_that_changes_on_the_way_is_found(lab, monkeypatch):
    monkeypatch.setattr(meshes, "CHAINS", {"1 to 2": (MODEL, [(1, []), (2, [])])})
    monkeypatch.setattr(meshes, "_two_to_one", lambda lab: ([], 0.0))
    assert meshes.moved(lab).passed
    lab.folder = lab.folder / "again"
    lab.folder.mkdir()
    monkeypatch.setattr(Lab, "module", lambda self, name: ["-c", FAULT])
    found = meshes.moved(lab)
    assert found.failures and all("norm" in text and "is not what was saved" in text for text in found.failures), found


@pytest.mark.slow
def test_a_bit_that_changes_from_two_processes_to_one_is_found(lab, monkeypatch):
    monkeypatch.setattr(meshes, "CHAINS", {})
    monkeypatch.setattr(Lab, "module", lambda self, name: ["-c", FAULT])
    failures = meshes.moved(lab).failures
    assert failures and all(text.startswith("2 processes to 1: ") and "norm" in text for text in failures), failures


@pytest.mark.fast
def test_what_was_saved_and_restored_is_compared(tmp_path):
    before, after = tmp_path / "a", tmp_path / "b"
    for out, name, hashes, loss in ((before, "saved", {"w": "1", "v": "2"}, 2.0), (after, "restored", {"w": "1"}, 2.1)):
        (out / "states").mkdir(parents=True)
        (out / f"states/{name}-4.json").write_text(json.dumps(hashes))
        (out / "metrics.jsonl").write_text(json.dumps({"step": 5, "loss": loss, "grad_norm": 1.0}))
    problems, off = meshes._compare(before, after, 4)
    assert problems[0] == "v is not what was saved" and problems[1].startswith("the loss of step 5 is 2.1, and 2.0")
    assert off == pytest.approx(0.05)
