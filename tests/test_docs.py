"""What README and docs say can be done, done: their commands parse, their code runs, their files are there."""

import importlib
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import yaml

import jaxllm
from jaxllm import cli, config
from jaxllm.train.config import RunConfig
from jaxllm.train.load import load_run
from jaxllm.train.step import make_state, make_train_step

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    text = page.read_text()
    commands = [line for block in blocks(page, "") for line in block.splitlines() if "jaxllm " in line]
    commands += [c for c in re.findall(r"`([^`\n]+)`", text) if re.match(r"(\.venv/bin/)?jaxllm [a-z]", c)]
    for command in commands:
        words = shlex.split(command, comments=True)
        words = words[next(i for i, w in enumerate(words) if w.endswith("jaxllm")) + 1 :]
        if " ".join(words) not in cli.EXAMPLES:  # the mere name of a verb
            cli.parse(words)


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
    (tmp_path / "README.md").write_text("def main():\n    return 1\n" * 20)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks(ROOT / "README.md", "python") if "import jax" in block)
    code = code.replace('"runs/demo"', repr(str(finished.folder))).replace("max_tokens=40", "max_tokens=8")
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["jaxllm"] is jaxllm and found["logits"].shape[-1] == finished.model.config.padded_vocab


def test_the_readme_commands_run(tmp_path, monkeypatch, capsys):
    """As printed and in order, in a folder with the repository's files; only the runs are made small."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("docs", "jaxllm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(blocks(ROOT / "README.md", "yaml")[0])
    small = ["model.embed=32", "model.layers=1", "train.steps=2", "train.seq_len=32", "train.batch=8"]
    commands = [line for block in blocks(ROOT / "README.md", "") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in commands if line.startswith("jaxllm ")]
    assert len(commands) > 6
    for words in commands:
        assert cli.main(words + small * ("mine.yaml" in words)) == 0, (words, capsys.readouterr().err)
    assert "warmup" in capsys.readouterr().out, "the last one shows all settings"


#: Files that docs/extending.md shows whole, by their names in the first line.
SHOWN = ("jaxllm/families/mistral.py", "examples/fp4.py")


@pytest.mark.fast
@pytest.mark.parametrize("name", SHOWN)
def test_the_files_of_the_docs_are_those_in_the_code(name):
    head = f"# {name}\n"
    block = next(text for text in blocks(ROOT / "docs/extending.md", "python") if text.startswith(head))
    assert block.removeprefix(head) == (ROOT / name).read_text()
    assert block.count("\n") < 100


@pytest.mark.real_models
def test_the_commands_for_published_models_run(monkeypatch, tmp_path, capsys):
    models = Path(os.environ.get("JAXLLM_MODELS", ROOT / "models")).resolve()
    if not models.is_dir():
        pytest.skip("no models; scripts/fetch_models.sh gets them")
    monkeypatch.setenv("JAXLLM_LAUNCH", "0")
    monkeypatch.setenv("HOME", str(tmp_path))
    generated, chat = blocks(ROOT / "README.md", "text")[:2]
    typed = iter([line.removeprefix("> ") for line in chat.splitlines() if line.startswith("> ")])

    def read(prompt):
        line = next(typed)
        print(prompt + line)
        return line

    monkeypatch.setattr("builtins.input", read)
    lines = next(text for text in blocks(ROOT / "README.md", "sh") if "models/" in text).splitlines()
    for line in lines[1:]:
        words = [word.replace("models/", f"{models}/") for word in shlex.split(line, comments=True)[1:]]
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
    shown = capsys.readouterr().out
    assert " ".join(generated.split()) in " ".join(shown.split())
    assert chat in shown


@pytest.fixture(scope="module")
def extending(tmp_path_factory):
    """`extending(name)`: the function of this name in docs/extending.md, whose block is a module of `mypackage`."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "mypackage").mkdir()
    texts = [
        text
        for text in blocks(ROOT / "docs" / "extending.md", "python")
        if not text.startswith(tuple(f"# {name}\n" for name in SHOWN))
    ]
    names = [re.search(r"^def (\w+)", text, re.MULTILINE)[1] for text in texts]
    for name, text in zip(names, texts, strict=True):
        module = "optimizers" if "mypackage/optimizers.py" in text else name
        (folder / f"mypackage/{module}.py").write_text(text)
    sys.path.insert(0, str(folder))
    yield lambda name: getattr(importlib.import_module(f"mypackage.{name}"), name)
    sys.path.remove(str(folder))


@pytest.mark.slow
def test_the_extensions_train(extending):
    from jaxllm.optim.config import OptimConfig
    from jaxllm.optim.optimizers import make_optimizer

    model = tiny.one_device(tiny.DENSE)
    tx = make_optimizer(OptimConfig(name="mypackage.optimizers:signsgd", lr=1e-3, weight_decay=0.0), 100, model.axes)
    state = make_state(model, tx, jax.random.key(0))
    before = np.asarray(state.params["norm"]["scale"]).copy()
    step = make_train_step(model, extending("smoothed"), tx)
    batch = model.sharding.batch(tiny.batch())
    found = []
    for _ in range(5):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[-1] < found[0] and float(metrics["penalty"]) > 0
    moved = np.abs(np.asarray(state.params["norm"]["scale"]) - before)
    assert moved.max() <= 5e-3 * 1.01 and moved.max() > 0
