"""The examples run, in small."""

import json
import runpy
from pathlib import Path

import pytest
import small

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_notebook_runs(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    raw = small.settings(corpus, "runs/notebook")
    overrides = [f"{section}={json.dumps(value)}" for section, value in raw.items()]
    found = runpy.run_path(str(EXAMPLES / "notebook.py"), init_globals={"overrides": overrides})
    assert found["run"].folder == Path("runs/notebook") and found["run"].summary["steps"] == 8
    assert found["norms"] and all(norm > 0 for norm in found["norms"].values())
    assert found["last"] < found["loss"] and found["after"] != found["before"]
    assert "bits per byte" in capsys.readouterr().out


def test_cells_are_marked():
    """Editors find a cell by `# %%` at the start of a line."""
    cells = (EXAMPLES / "notebook.py").read_text().count("\n# %%")
    assert cells >= 10
