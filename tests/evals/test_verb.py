"""`jaxllm eval` and the functions behind it: sources by themselves and together, and task files."""

import json

import pytest

import jaxllm
from jaxllm import api, cli
from jaxllm.data.sources import Source
from jaxllm.errors import SettingsError

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def verb(finished, capsys):
    """`verb(*argv)`: `(exit code, what was printed, what was said)`."""

    def call(*argv):
        capsys.readouterr()
        code = cli.main(["eval", str(finished.folder), *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def test_sources_by_themselves_and_together(finished, corpus, verb):
    code, prose = str(corpus / "code-0.txt"), str(corpus / "prose-*.txt")
    alone = [json.loads(verb("--data", path, "--json")[1]) for path in (code, prose)]
    found = json.loads(verb("--data", code, "--data", f"words={prose}", "--json")[1])
    for key in alone[0]:
        assert [found[f"{key}/code-0"], found[f"{key}/words"]] == pytest.approx([one[key] for one in alone], rel=1e-5)
    for key in ("documents", "tokens", "bytes"):
        assert found[key] == alone[0][key] + alone[1][key]
    bits = sum(one["bits_per_byte"] * one["bytes"] for one in alone)
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"], rel=1e-5)
    assert len(found) == 3 * len(alone[0])
    table = verb("--data", code, "--data", f"words={prose}")[1].splitlines()
    assert table[0].split() == ["all", "code-0", "words"] and table[3].split() == [
        "bits_per_byte",
        *(f"{found['bits_per_byte' + name]:.4f}" for name in ("", "/code-0", "/words")),
    ]
    assert verb("--data", code)[1].splitlines()[0].split() == ["heldout_loss", f"{alone[0]['heldout_loss']:.4f}"]


def test_task_files(verb, write):
    choices = write(
        *({"prompt": f"def f{i}", "choices": ["x", "wizards vex 12345 judges"], "answer": 0} for i in range(4))
    )
    sums = write({"prompt": "1 + 1 =", "answers": ["2"], "max_tokens": 3}, name="sums.jsonl")
    code, out, _ = verb("--tasks", choices, sums)
    assert code == 0 and out.splitlines()[0] == f"{choices}: multiple choice, 4 items, 0-shot"
    assert out.splitlines()[1].split() == ["acc", "1.0000", "±", "0.0000"], "the short one is likelier"
    assert out.splitlines()[3:] == [f"{sums}: exact match, 1 items, 0-shot", "  exact_match    0.0000"]
    found = json.loads(verb("--tasks", choices, "--shots", 2, "--seed", 1, "--json")[1])[str(choices)]
    assert found["shots"] == 2 and found["acc_stderr"] is not None


def test_what_would_be_ignored_is_refused(finished, verb, write, corpus):
    task, text = write({"prompt": "a", "completion": "b"}), corpus / "code-0.txt"
    assert verb("--data", text, "--shots", 1)[::2] == (
        2,
        "error: --data measures text and would ignore --shots; leave that out\n",
    )
    assert "would ignore --field, --seq-len" in verb("--tasks", task, "--field", "x", "--seq-len", 8)[2]
    assert "two sources would be called code-0" in verb("--data", text, "--data", text)[2]
    assert "without shots shots_from and seed are ignored" in verb("--tasks", task, "--seed", 1)[2]
    assert "has 0 other items" in verb("--tasks", task, "--shots", 1)[2]
    assert "config.json" in verb("--tasks", task, "--ignore-key", "rope_foo")[2], "of published models only"
    for both in (["--data", str(text), "--tasks", str(task)], []):
        with pytest.raises(SystemExit):
            verb(*both)
    loaded = jaxllm.load(finished.folder)
    with pytest.raises(SettingsError, match="shots=-1"):
        api.evaluate_tasks(loaded, task, shots=-1)
    with pytest.raises(SettingsError, match="not some of each"):
        api.evaluate(loaded, [str(text), Source(name="x", path=str(text))])


def test_a_published_model(finished, verb, write, tmp_path, capsys):
    """A Hugging Face folder gives what the run that it was exported from gives."""
    task = write({"prompt": "def f1", "completion": "(self, x):"}, {"prompt": "the", "completion": "dogs"})
    assert api.export(jaxllm.load(finished.folder), tmp_path / "hf")
    of_run = json.loads(verb("--tasks", task, "--json")[1])[str(task)]
    assert cli.main(["eval", str(tmp_path / "hf"), "--tasks", str(task), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(task)]
    assert found.keys() == of_run.keys()
    assert found["loglikelihood"] == pytest.approx(of_run["loglikelihood"], rel=1e-5)
