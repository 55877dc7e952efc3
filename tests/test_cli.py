"""The command line: what every verb prints, what bad input gets, and that asking for help is quick."""

import argparse
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import psutil
import pytest
import small
import tiny
import yaml

import jaxllm.demo
from jaxllm import api, cli
from jaxllm.checkpoint import Preemption
from jaxllm.errors import SettingsError
from jaxllm.train import loop, runs

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def run_file(corpus, tmp_path):
    """A settings file whose run goes into the folder `run`."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(small.settings(corpus, "run")))
    return str(path)


@pytest.fixture
def refused(capsys):
    """`refused(words, *argv)`: the verb exits with 2 and one or two lines, or so many, that hold the words."""

    def check(words, *argv, lines=2):
        capsys.readouterr()
        assert cli.main([str(arg) for arg in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") <= lines, err
        for word in words:
            assert word in err, err

    return check


def leaves(parser, name=()):
    """`(words, parser)` of every verb that does something."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, verb in action.choices.items():
            yield from leaves(verb, (*name, word))


@pytest.mark.fast
def test_every_verb_shows_an_example_that_parses():
    verbs = dict(leaves(cli.parser()))
    assert {" ".join(words) for words in verbs} == set(cli.EXAMPLES)
    for words, verb in verbs.items():
        example = cli.EXAMPLES[" ".join(words)]
        assert f"example:\n  {example}" in verb.format_help()
        parsed = cli.parse(shlex.split(example)[1:])
        assert parsed.run is verb.get_default("run") and getattr(parsed, "load", None) is verb.get_default("load")


@pytest.mark.fast
def test_overrides_may_stand_anywhere(capsys):
    args = cli.parse(["train", "demo", "a=1", "--quiet", "b=2", "--print-config", "c=3"])
    assert args.overrides == ["a=1", "b=2", "c=3"] and args.quiet and args.print_config
    for argv in (["train", "demo", "--quite"], ["runs", "list", "runs", "a=1"]):
        with pytest.raises(SystemExit) as stopped:
            cli.parse(argv)
        assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.fast
def test_help_is_quick_and_loads_no_jax():
    code = "import sys; from jaxllm import cli; cli.parser().format_help(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "jaxllm.cli", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0 and "generate" in done.stdout
    assert min(times) < 0.3


@pytest.mark.fast
def test_print_config_shows_all_settings_and_reads_back(run_file, corpus, capsys, tmp_path):
    assert cli.main(["train", run_file, "--print-config", "train.steps=9"]) == 0
    out = capsys.readouterr().out
    assert "Optimizer steps; null when stages give them." in out
    assert yaml.safe_load(out)["train"]["steps"] == 9
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_print_config_with_the_dial_shows_the_derivation(capsys):
    assert cli.main(["train", "demo", "model.depth=4", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "tokens" in out and "Hoffmann et al. 2022" in out
    shown = yaml.safe_load(out[out.index("out: ") :])
    assert shown["model"]["layers"] == 4 and shown["model"]["embed"] == 256
    assert f"so: {shown['train']['steps']:,} steps of {shown['train']['batch']} rows" in out


SETTINGS = [
    (["train.stepz"], "unknown setting train.stepz; did you mean train.steps?"),
    (["train.steps=many"], "train.steps='many'"),
    (["model.pattern.0.attn.kv_heads=3"], "heads=4 must be a multiple of kv_heads=3"),
    (["model.embed=30"], "embed=30 does not divide by heads=4"),
    (["model.positions=learned", "train.seq_len=128"], "train.seq_len=128 is longer than the 64 learned positions"),
    (["model.vocab=399"], "the tokenizer has 400 pieces and the model a vocabulary of 399; set model.vocab=400"),
    (["data.sources.0.path=nothing.txt"], "no file matches"),
    (["data.sources.0.path=empty.txt"], "empty.txt is empty"),
    (["data.sources.0.path=latin1.txt"], "latin1.txt: line 1, byte 5: not UTF-8 (0xe9"),
    (["data.tokenizer=nowhere"], "nowhere: no such file"),
    (["data.tokenizer=latin1.txt"], "not a SentencePiece model"),
    (["train.batch=12"], "12 rows in a microbatch (batch 12 / accumulate 1) do not divide over 8 devices"),
    (["train.accumulate=3"], "batch=8 does not divide by accumulate=3"),
    (["parallel.data=3"], "does not fit 8 devices; products that fit: 1, 2, 4, 8"),
    (["parallel.data=2", "parallel.fsdp=2"], "the mesh data=2 x fsdp=2 does not fit 8 devices; the product must be 8"),
    (["parallel.fsdp=1", "parallel.context=8", "train.seq_len=36"], "does not divide over parallel.context=8"),
    (["parallel.fsdp=1", "parallel.tensor=8"], "does not divide over tensor=8"),
    (["parallel.rules.headz=null"], "headz"),
    (["train.init=nowhere"], "nowhere: no such folder"),
    (["train.trainable=heads/**"], "no parameter matches 'heads/**'"),
    (["optim.name=adam"], "did you mean adamw?"),
    (["optim.momentum=0.9"], "momentum=0.9 would be ignored by optimizer adamw"),
    (["optim.schedule.warmup=9"], "do not fit into 8 steps"),
    (["data.heldout=0", "train.patience=3"], "train.patience=3 would be ignored without held-out text"),
    (["profile.steps=9-10"], "profile.steps=9-10 lies after the last of 8 steps"),
    (["out=latin1.txt/run"], "cannot be written"),
    (["out=orphan"], "metrics.jsonl is there, but no orphan/settings.yaml"),
    (["model=nothing"], "no such settings file: nothing"),
    (["model.depth=2", "optim.lr=fast"], "optim.lr=fast: must be a number above 0"),
]


@pytest.mark.parametrize("overrides, message", SETTINGS, ids=[" ".join(overrides) for overrides, _ in SETTINGS])
def test_impossible_settings_are_refused_before_anything_is_written(overrides, message, run_file, refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"A caf\xe9")
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan/metrics.jsonl").touch()
    before = {path for path in tmp_path.rglob("*") if ".cache" not in path.parts}
    overrides = [text if "=" in text else text + "=1" for text in overrides]
    refused([message], "train", run_file, *overrides, "--quiet")
    assert {path for path in tmp_path.rglob("*") if ".cache" not in path.parts} == before


@pytest.mark.fast
@pytest.mark.parametrize(
    "text, message",
    [
        (b"train: {steps: 3", "not valid YAML at line"),
        (b"model: caf\xe9", "not UTF-8 at byte 10"),
        (b"- 1\n- 2\n", "expected `key: value` lines, found a list"),
        (b"model: demo\ntrain: {steps: 3}\n", "data is required"),
    ],
)
def test_a_damaged_settings_file_is_refused(text, message, refused, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(text)
    refused(["bad.yaml", message], "train", "bad.yaml")


@pytest.mark.fast
def test_other_bad_arguments_are_refused(corpus, refused, tmp_path):
    refused(["no such settings file: dmo; did you mean demo?"], "train", "dmo")
    refused(["override 'train.steps'", "section.key=value"], "train", "demo", "train.steps")
    refused(["nowhere: no such folder"], "runs", "list", "nowhere")
    refused(["nowhere: no such folder"], "runs", "compare", "nowhere", "elsewhere")
    refused(["nowhere: no such folder"], "generate", "nowhere", "--prompt", "x")
    refused(["would ignore --top-k"], "generate", "nowhere", "--prompt", "x", "--temperature", "0", "--top-k", "5")
    refused(["nowhere: no such folder"], "eval", "nowhere", "--data", "x.txt")
    words = ["token id 400 at position 1 is outside the vocabulary of 400"]
    refused(words, "tokenizer", "decode", corpus / "tokenizer", 5, 400)
    refused(["already holds a tokenizer"], "tokenizer", "train", corpus / "*.txt", "--out", corpus / "tokenizer")
    refused(["no file matches"], "tokenizer", "train", "nothing*.txt", "--out", "new")
    refused(["surrogate"], "tokenizer", "encode", corpus / "tokenizer", "a\udcff")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named_before_anything_is_written(run_file, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    refused(["pip install 'jaxllm[tensorboard]'"], "train", run_file, "log.tensorboard=true", "--quiet")
    assert not (tmp_path / "run").exists()


def test_a_disk_or_memory_too_small_is_said_before_anything_is_written(run_file, refused, tmp_path, monkeypatch):
    before = set(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e6, used=1e6, free=1000))
        refused(["would not fit", "1000 Bytes are free", "checkpoint.keep"], "train", run_file, "--quiet")
    kinds = ["parameters", "gradients", "optimizer state", "activations", "logits", "temporaries"]
    for kib, words in ((8, ["weights", "optimizer", "8.0 KiB"]), (100, ["activations", "a smaller model"])):
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda kib=kib: SimpleNamespace(available=kib * 1024 * 8))
            words = ["too little memory: a device needs", *kinds, *words]
            refused(words, "train", run_file, "--quiet", lines=20)  # a table, and what would make it fit
    assert set(tmp_path.rglob("*")) == before


def test_a_run_folder_of_other_settings_is_left_alone(finished, corpus, refused, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(small.settings(corpus, finished.folder)))
    before = small.bits(contents(finished.folder))
    words = [
        "holds a run with other settings",
        "optim.lr: 0.01 there, 0.5 now",
        "train.steps: 8 there, 9 now",
        "out=...",
    ]
    refused(words, "train", "other.yaml", "optim.lr=0.5", "train.steps=9", "log.every=2")
    assert small.bits(contents(finished.folder)) == before


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(finished, corpus, refused, tmp_path, monkeypatch):
    shutil.copytree(finished.folder, tmp_path / "run")
    assert cli.main(["tokenizer", "train", str(corpus / "prose-*.txt"), "--vocab", "330", "--out", "other"]) == 0
    shutil.copy("other/tokenizer.model", "run/tokenizer/tokenizer.model")
    words = ["not the one of the checkpoint", finished.tokenizer.hash[:12]]
    refused(words, "generate", "run", "--prompt", "x")
    refused(words, "eval", "run", "--data", corpus / "prose-0.txt")
    saved = yaml.safe_load((tmp_path / "run/settings.yaml").read_text()) | {"out": "run"}
    (tmp_path / "run/settings.yaml").write_text(yaml.safe_dump(saved))
    refused(["is not the tokenizer of this run's checkpoints"], "train", "run/settings.yaml", "--quiet")


def test_data_that_changed_since_the_checkpoint_is_refused(finished, corpus, refused, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "text")
    raw = yaml.safe_load((tmp_path / "run/settings.yaml").read_text()) | {"out": "run"}
    for source in raw["data"]["sources"]:
        source["path"] = source["path"].replace(str(corpus), "text")
    (tmp_path / "run/settings.yaml").write_text(yaml.safe_dump(raw))
    assert cli.main(["train", "run/settings.yaml", "--quiet"]) == 0, "the same text in another place"
    (tmp_path / "text/code-3.txt").write_text("changed\n")
    refused(["the data of run has changed since its checkpoints"], "train", "run/settings.yaml", "--quiet")


def test_export_writes_what_loads_as_the_same_model(finished, refused, tmp_path, capsys):
    wanted = jax.device_get(api.load(finished.folder).params)
    for to, name in (("hf", "folder"), ("gguf", "a.gguf")):
        assert cli.main(["export", str(finished.folder), "--to", to, "--out", str(tmp_path / name)]) == 0
        assert "a llama model in float32" in capsys.readouterr().out
        assert tiny.bit_equal(api.load(tmp_path / name).params, wanted)
    smaller = ["--to", "gguf", "--out", tmp_path / "b.gguf", "--dtype"]
    assert cli.main(["export", str(finished.folder), *map(str, smaller), "q8_0"]) == 0
    assert (tmp_path / "b.gguf").stat().st_size < (tmp_path / "a.gguf").stat().st_size
    refused(
        ["dtype='int3': known are f32"], "export", finished.folder, *smaller[:3], tmp_path / "c.gguf", "--dtype", "int3"
    )


def test_generate_refuses_prompts_it_cannot_take(finished, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"caf\xe9")))
    refused(["standard input: not UTF-8 at byte 3"], "generate", finished.folder, "--prompt", "-")
    refused(["surrogate"], "generate", finished.folder, "--prompt", "caf\udce9")
    long = "wizard " * 60
    words = [f"has {len(finished.tokenizer.encode(long, bos=True))} tokens", "passes the model's context of 64"]
    refused(words, "generate", finished.folder, "--prompt", long)
    refused(["temperature"], "generate", finished.folder, "--prompt", "x", "--temperature=-1", "--max-tokens", 5)
    refused(["holds no extra/ema"], "generate", finished.folder, "--prompt", "x", "--ema")


@pytest.mark.fast
@pytest.mark.parametrize(
    "options, message",
    [
        (["--temperature", "0", "--top-k", "5", "--seed", "1"], "is greedy and would ignore --top-k, --seed"),
        (["--temperature", "0", "--typical-p", "0.5"], "would ignore --typical-p"),
        (["--beams", "3", "--temperature", "0.5"], "--beams searches and would ignore --temperature"),
        (["--beams", "3", "--stop", "x", "--logprobs", "2"], "would ignore --stop, --logprobs"),
        (["--length-penalty", "2"], "without --beams this samples and would ignore --length-penalty"),
    ],
)
def test_options_of_generate_that_would_be_ignored_are_refused(options, message, refused):
    refused([message], "generate", "nowhere", "--prompt", "x", *options)


@pytest.mark.slow
def test_generate_samples_searches_and_shows_log_probabilities(finished, capsys):
    def made(*options):
        assert cli.main(["generate", str(finished.folder), "--prompt", "def f", "--max-tokens", "8", *options]) == 0
        return capsys.readouterr().out

    greedy = made("--temperature", "0")
    assert made("--temperature", "0", "--repetition-penalty", "5") != greedy
    assert made("--temperature", "0", "--stop", greedy[7:9], "--stop", "no such text") == greedy[:7] + "\n"
    several = made("--n", "2", "--seed", "3")
    assert several.startswith("--- 1 of 2\ndef f") and "\n--- 2 of 2\ndef f" in several
    assert made("--seed", "4") in several and made("--seed", "3") in several
    assert made("--beams", "1") == greedy and made("--beams", "3", "--n", "2").count("def f") >= 2
    lines = made("--temperature", "0", "--logprobs", "2").removeprefix(greedy).splitlines()
    assert lines[:2] == ["", " logprob  token"] and len(lines) == 10
    for line in lines[2:]:
        values = re.findall(r"(?<=\s)-\d+\.\d{3}", line)
        assert len(values) == 3 and values[0] == values[1] and float(values[1]) >= float(values[2])


def test_chat_talks_with_a_run(finished, capsys, monkeypatch):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", str(finished.folder), "--max-tokens", "5", "--system", "be brief", "--seed", "1"]) == 0
    assert "context of 64 tokens; /help shows the commands" in capsys.readouterr().out


def test_eval_refuses_files_it_cannot_read(finished, refused, tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    refused(["no file matches"], "eval", finished.folder, "--data", "nothing.txt")
    refused(["is empty"], "eval", finished.folder, "--data", "empty.txt")
    refused(["line 1, byte 3: not UTF-8"], "eval", finished.folder, "--data", "latin1.txt")


def test_train_prints_its_result_and_exits_as_the_settings_say_when_preempted(run_file, capsys, monkeypatch, tmp_path):
    reached = Preemption.reached
    monkeypatch.setattr(Preemption, "reached", lambda self, step: step == 2)
    assert cli.main(["train", run_file, "checkpoint.preempted_exit_code=7"]) == 7
    assert capsys.readouterr().out.startswith("preempted at step 2: run\n")
    monkeypatch.setattr(Preemption, "reached", reached)
    assert cli.main(["train", run_file]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("finished at step 8: run\nloss ") and "bits_per_byte" in out
    assert "resumed run at step 2" in err and "step 8/8" in err


def test_a_last_checkpoint_that_was_not_saved_is_an_exit_code(run_file, capsys, monkeypatch):
    free = iter([1 << 40])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free, 1000)))
    assert cli.main(["train", run_file, "--quiet"]) == 1
    assert "the last checkpoint was not saved" in capsys.readouterr().err


def test_eval_generate_and_runs_on_a_run_folder(finished, corpus, capsys):
    folder = str(finished.folder)
    assert cli.main(["eval", folder, "--data", str(corpus / "code-*.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 12 and 0 < found["bits_per_byte"] < 8
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.main(["generate", folder, "--prompt", "def f", "--max-tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def f") and texts[0].endswith("\n")
    assert cli.main(["runs", "list", str(finished.folder.parent)]) == 0
    assert "finished" in capsys.readouterr().out
    assert cli.main(["runs", "compare", folder, folder]) == 0
    assert "same settings" in capsys.readouterr().out


@pytest.mark.fast
def test_tokenizer_and_data_verbs(corpus, run_file, capsys):
    text = "  wizards ünd 🦊\n"
    assert cli.main(["tokenizer", "encode", str(corpus / "tokenizer"), text]) == 0
    ids = capsys.readouterr().out.split()
    assert cli.main(["tokenizer", "decode", str(corpus / "tokenizer"), *ids]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert cli.main(["data", "prepare", run_file]) == 0
    assert "code-heldout:" in capsys.readouterr().out
    assert cli.main(["data", "inspect", run_file, "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"source {name}:") for name in ("code", "code-heldout", "prose", "prose-heldout")] == [1] * 4
    assert cli.main(["data", "inspect", run_file, "--step", "2"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^row (\d+), of (?:code|prose)$", out, re.M) == [str(row) for row in range(8, 16)]
    parts = re.findall(
        rf"document \d+, tokens [\d,]+ to [\d,]+, from line ([\d,]+) of its text: ({corpus}/.*)\n +(.*)", out
    )
    for line, path, pieces in parts:
        text = (corpus / path).read_text().split("\n", int(line.replace(",", "")) - 1)[-1]
        begins = re.split("<0x|▁▁", pieces)[0].replace("|", "").replace("▁", " ").replace("⏎", "\n")
        assert 0 <= text.find(begins) <= text.find("\n"), (line, path, begins)
    assert parts
    assert cli.main(["data", "inspect", run_file, "--step", "0"]) == 2
    assert "step 0 is none of the run, whose steps are 1 to" in capsys.readouterr().err


@pytest.mark.fast
def test_a_traceback_only_with_debug():
    for debug in ([], ["--debug"]):
        argv = [sys.executable, "-m", "jaxllm.cli", "train", "demo", "train.stepz=1", *debug]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert ("Traceback" in done.stderr) == bool(debug)
        assert done.returncode == (1 if debug else 2)


@pytest.mark.fast
def test_the_unexpected_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr(runs, "list_runs", lambda folder: 1 / 0)
    assert cli.main(["runs", "list"]) == 1
    assert (
        capsys.readouterr().err
        == "unexpected ZeroDivisionError: division by zero\nrun again with --debug to see where\n"
    )


@pytest.mark.fast
def test_the_demo_refuses_what_it_sets_itself():
    with pytest.raises(SettingsError, match="train.steps.*--minutes"):
        jaxllm.demo.demo(overrides=["train.steps=5"])
    with pytest.raises(SettingsError, match="minutes"):
        jaxllm.demo.demo(minutes=0)


def test_a_run_that_ends_with_a_loss_that_is_no_number_says_so(run_file, monkeypatch, capsys):
    config = SimpleNamespace(checkpoint=SimpleNamespace(preempted_exit_code=0))
    summary = {"steps": 8, "loss": None, "heldout_loss": 2.5}
    result = SimpleNamespace(status="finished", folder="run", summary=summary, saved=True, config=config)
    monkeypatch.setattr(loop, "train", lambda *_, **__: result)
    assert cli.main(["train", run_file]) == 0
    assert capsys.readouterr().out == "finished at step 8: run\nloss not finite\nheldout_loss 2.5000\n"
