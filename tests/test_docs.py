"""What README and docs say can be done, done: their commands parse, their code runs, their files are there."""

import re
import shlex
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import yaml

import jaxllm
from jaxllm import cli, config
from jaxllm.train.config import RunConfig, load_run
from jaxllm.train.step import make_state, make_train_step

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    text = page.read_text()
    commands = [line for block in blocks(page, "") for line in block.splitlines() if "jaxllm " in line]
    commands += [c for c in re.findall(r"`([^`\n]+)`", text) if re.match(r"(\.venv/bin/)?jaxllm [a-z]", c)]
    for command in commands:
        words = shlex.split(command, comments=True)
        words = words[next(i for i, w in enumerate(words) if w.endswith("jaxllm")) + 1 :]
        cli.parser().parse_args(words)


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_are_there(page):
    known = r"`((?:jaxllm|configs|scripts|docs|tests|examples)/[\w./-]+\.\w+)`"
    missing = [name for name in re.findall(known, page.read_text()) if not (ROOT / name).exists()]
    assert not missing
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    assert not [name for name in pictures if not (page.parent / name).exists()]


@pytest.mark.fast
def test_the_readme_settings_are_settings(tmp_path):
    block, name = blocks(ROOT / "README.md", "yaml")[0], "mine.yaml"
    assert name in block
    (tmp_path / name).write_text(block)
    settings, _ = load_run(tmp_path / name)
    assert settings.out == "runs/mine" and settings.data.heldout == 0.05
    text = config.describe(settings)
    assert config.parse(RunConfig, yaml.safe_load(text)) == settings


def test_the_readme_python_runs(finished, tmp_path, monkeypatch):
    (tmp_path / "some_file.py").write_text("def main():\n    return 1\n" * 20)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks(ROOT / "README.md", "python") if "import jax" in block)
    code = code.replace('"runs/demo"', repr(str(finished.folder))).replace("max_tokens=40", "max_tokens=8")
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["jaxllm"] is jaxllm and found["logits"].shape[-1] == finished.model.config.padded_vocab


@pytest.fixture(scope="module")
def extending():
    """The functions that docs/extending.md defines."""
    found = {"jax": jax, "jnp": jnp, "optax": optax}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        exec(compile(block, "docs/extending.md", "exec"), found)
    return found


def test_the_extensions_train(extending, monkeypatch):
    from jaxllm.optim.config import OptimConfig
    from jaxllm.optim.optimizers import make_optimizer

    module = types.SimpleNamespace(signsgd=extending["signsgd"])
    monkeypatch.setitem(__import__("sys").modules, "mypackage.optimizers", module)
    monkeypatch.setitem(__import__("sys").modules, "mypackage", types.SimpleNamespace(optimizers=module))
    model = tiny.one_device(tiny.DENSE)
    tx = make_optimizer(OptimConfig(name="mypackage.optimizers:signsgd", lr=1e-3, weight_decay=0.0), 100, model.axes)
    state = make_state(model, tx, jax.random.key(0))
    before = np.asarray(state.params["norm"]["scale"]).copy()
    step = make_train_step(model, extending["smoothed"], tx)
    batch = model.sharding.batch(tiny.batch())
    found = []
    for _ in range(5):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[-1] < found[0] and float(metrics["penalty"]) > 0
    moved = np.abs(np.asarray(state.params["norm"]["scale"]) - before)
    assert moved.max() <= 5e-3 * 1.01 and moved.max() > 0
