"""lm-eval's own loop over a local task, and its requests one by one, on our models."""

import json
import sys
from types import SimpleNamespace

import pytest

from jaxllm.errors import MissingExtra, SettingsError
from jaxllm.evals.run import run_task
from jaxllm.evals.score import encode_pair
from jaxllm.evals.tasks import prompts, read_task


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "jaxllm.evals.lm_eval", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'jaxllm\[eval\]'"):
        import jaxllm.evals.lm_eval  # noqa: F401


@pytest.fixture
def adapter(loaded):
    pytest.importorskip("lm_eval")
    from jaxllm.evals.lm_eval import JaxllmLM

    return JaxllmLM(loaded, batch=3)


TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SAY = """doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.lm_eval
def test_lm_eval_runs_a_local_task_and_finds_what_we_find(adapter, loaded, write, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    words = ["the dog", "a fox", "it sleeps", "no fox jumps", "maybe", "yes and no"]
    choices = [{"prompt": p, "choices": words[:4], "answer": i % 4} for i, p in enumerate(words)]
    said = adapter.generate_until([request("over the", until=["\n"], max_gen_toks=6)])[0]
    answers = [{"prompt": p, "answers": [said], "max_tokens": 6} for p in ("over the", "dog and")]
    files = {
        "multiple_choice": write(*choices, name="choices.jsonl"),
        "generate_until": write(*answers, name="say.jsonl"),
    }
    for kind, file in files.items():
        text = TASK.format(kind=kind, file=file) + (CHOICE if kind == "multiple_choice" else SAY)
        (tmp_path / f"{kind}.yaml").write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = dict(task_manager=manager, bootstrap_iters=0)
    results = lm_eval.simple_evaluate(model=adapter, tasks=[f"local_{kind}" for kind in files], **options)["results"]
    ours = {kind: ask(loaded, file) for kind, file in files.items()}
    for name in ("acc", "acc_norm"):
        assert results["local_multiple_choice"][f"{name},none"] == ours["multiple_choice"][name]
    assert results["local_generate_until"]["exact_match,none"] == ours["generate_until"]["exact_match"] > 0
    json.dumps(results)


def ask(loaded, file):
    task = read_task(file)
    return run_task(loaded, task, prompts(task))


def request(context, *rest, **options):
    return SimpleNamespace(args=(context, *rest, *([options] if options else [])))


@pytest.mark.lm_eval
def test_loglikelihood_is_that_of_a_plain_pass(adapter, loaded):
    texts = [("the quick", " brown fox"), ("the ", "dog"), ("", "maybe")]
    found = adapter.loglikelihood([request(*pair) for pair in texts])
    wanted = [loaded.by_hand(*encode_pair(loaded.tokenizer, *pair)) for pair in texts]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.lm_eval
def test_a_long_context_loses_its_beginning_and_that_is_said(adapter, loaded, caplog):
    long = "the dog sleeps and " * 20
    ((nats, _),) = adapter.loglikelihood([request(long, "it jumps")])
    pair = encode_pair(loaded.tokenizer, long, "it jumps")
    kept = 49 - len(pair.continuation)
    assert nats == pytest.approx(loaded.by_hand(pair.context[-kept:], pair.continuation)[0], rel=1e-5)
    assert "1 of 1 prompts are longer than the model's context of 48 tokens" in caplog.text
    with pytest.raises(SettingsError, match=r"pair 0: 1 tokens of context and \d+ to score"):
        adapter.loglikelihood([request("the", " " + long)])


@pytest.mark.lm_eval
def test_a_long_text_is_scored_once_in_windows(adapter, loaded):
    text = "yes, no, maybe: the quick brown fox jumps over it " * 3 + "dog"
    ids = loaded.tokenizer.encode(text).tolist()
    line, nats, at = [loaded.tokenizer.bos, *ids], 0.0, 0
    assert 96 < len(ids) and len(ids) % 48, "three windows or more, the last one shorter"
    while at < len(ids):
        n = min(48, len(ids) - at)
        start = max(0, at + n - 48) if at else 0
        nats += loaded.by_hand(line[start : at + 1], line[at + 1 : at + 1 + n])[0]
        at += n
    short = "the dog"
    found = adapter.loglikelihood_rolling([request(text), request(short), request("")])
    wanted = loaded.by_hand([loaded.tokenizer.bos], loaded.tokenizer.encode(short).tolist())[0]
    assert found == pytest.approx([nats, wanted, 0.0], rel=1e-5)


@pytest.mark.lm_eval
def test_generation_goes_by_the_tasks_options(adapter, loaded):
    from jaxllm.generate.text import generate_text

    def made(prompt, **options):
        return generate_text(loaded.model, loaded.decoding, loaded.tokenizer, [prompt], **options)[0].text

    greedy = made("the", max_tokens=6, temperature=0)
    assert adapter.generate_until(
        [request("the", until=[], max_gen_toks=6, temperature=1.0, do_sample=False, top_p=0.5)]
    ) == [greedy]
    stop = greedy[3]
    one, two = adapter.generate_until(
        [request("the", until=stop, max_gen_toks=6), request("dog", until=None, max_tokens=4)]
    )
    assert one == made("the", max_tokens=6, temperature=0, stop=stop)
    assert two == made("dog", max_tokens=4, temperature=0)
    drawn = adapter.generate_until([request("the", do_sample=True, temperature=3.0, max_gen_toks=6)] * 3)
    assert len(set(drawn)) == 3 and drawn[1] == made("the", temperature=3.0, seed=1, max_tokens=6)
    ids = loaded.tokenizer.encode("the dog " * 30, bos=True).tolist()
    assert adapter.generate_until([request("the dog " * 30, max_gen_toks=8, until=[])]) == [
        made(ids[-40:], max_tokens=8, temperature=0)
    ]
    with pytest.raises(SettingsError, match="num_beams=4 would be ignored"):
        adapter.generate_until([request("the", num_beams=4)])
    with pytest.raises(SettingsError, match="the task wants 256 tokens, and the model's context is 48"):
        adapter.generate_until([request("the", until=["x"])])
