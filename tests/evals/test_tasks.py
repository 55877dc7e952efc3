"""Task files: what an item means, its prompt with examples, and what is wrong with a line."""

import re

import pytest

from jaxllm.errors import DataError
from jaxllm.evals.tasks import prompts, read_task

CAPITALS = [
    {"question": "Capital of France?", "choices": ["Paris", "Rome"], "answer": 0},
    {"question": "Capital of Italy?", "choices": ["Paris", "Rome"], "answer": 1},
    {"question": "Capital of Japan?", "choices": ["Osaka", "Tokyo"], "answer": 1},
]

pytestmark = pytest.mark.fast


def test_few_shot_prompts_are_these(write):
    task = read_task(write(*CAPITALS))
    assert task.kind == "multiple_choice" and task.lines == (1, 2, 3)
    france = "Question: Capital of France?\nAnswer:"
    italy = "Question: Capital of Italy?\nAnswer:"
    assert prompts(task)[:2] == [france, italy]
    assert prompts(task, shots=1)[:2] == [f"{italy} Rome\n\n{france}", f"{france} Paris\n\n{italy}"]
    assert prompts(task, shots=2)[2] == f"{france} Paris\n\n{italy} Rome\n\nQuestion: Capital of Japan?\nAnswer:"


def test_examples_from_another_file_and_shuffled_ones(write):
    task = read_task(write(*CAPITALS[:2]))
    pool = read_task(write(*CAPITALS[1:], name="pool.jsonl"))
    both = prompts(task, shots=1, pool=pool)
    assert both[0].startswith("Question: Capital of Italy?\nAnswer: Rome\n\n")
    assert both[1].startswith("Question: Capital of Japan?\nAnswer: Tokyo\n\n"), "never its own answer"
    big = read_task(write(*({"prompt": f"{i} is", "completion": "it"} for i in range(20)), name="big.jsonl"))
    assert prompts(big, 3, seed=1) == prompts(big, 3, seed=1) != prompts(big, 3, seed=2)
    assert len({p.partition(" is")[0] for p in prompts(big, 3, seed=1)[10:]}) <= 2, "the same ones for all"
    assert all(p.count(f"{i} is it") == 0 for i, p in enumerate(prompts(big, 19, seed=1)) if i > 9)


def test_join_is_put_only_where_there_is_no_white_space(write):
    forms = [("It is", "so"), ("It is ", "so"), ("It is", " so"), ("", "so"), ("It is\n", "so")]
    task = read_task(write(*({"prompt": p, "completion": c} for p, c in forms)))
    assert [item.example for item in task.items] == ["It is so", "It is so", "It is so", "so", "It is\nso"]
    glued = read_task(write({"prompt": "un", "completion": "do", "join": ""}))
    assert glued.items[0].example == "undo"


def test_texts_without_a_prompt_can_be_examples_of_each_other(write):
    task = read_task(write({"prompt": "", "completion": "one"}, {"prompt": "", "completion": "two"}))
    assert prompts(task, shots=1) == ["two\n\n", "one\n\n"]


def test_an_example_of_exact_match_shows_the_first_answer(write):
    items = ({"prompt": f"{i}:", "answers": [f"a{i}", "b"], "stop": "."} for i in range(2))
    task = read_task(write(*items))
    assert task.items[0].stop == (".",) and prompts(task, shots=1)[1] == "0: a0\n\n1:"


GOOD = '{"prompt": "a", "choices": ["x", "y"], "answer": 0}'
BAD = {
    '{"prompt": "a", "choices"': "line 2, column 26: not JSON",
    "[1, 2]": "expected an object",
    '{"prompt": "a", "choices": ["x", "y"], "answer": 2}': "answer=2 of 2 choices",
    '{"prompt": "a", "choices": ["x", "y"], "answer": -1}': "answer=-1 of 2 choices",
    '{"prompt": "a", "choices": ["x"], "answer": 0}': "answer=0 of 1 choices",
    '{"prompt": "a", "choices": ["x", "y"], "answer": true}': "not yes or no",
    '{"prompt": "a", "choices": ["x", "y"], "answer": "B"}': "answer='B'",
    '{"prompt": "a", "choices": ["x", "y"]}': "choices need it",
    '{"prompt": "a", "choices": ["x", " "], "answer": 0}': "without a visible character",
    '{"prompt": "a", "choises": ["x", "y"], "answer": 0}': "unknown key choises; did you mean choices?",
    '{"prompt": "a", "completion": 5}': "completion=5",
    '{"prompt": "a", "completion": "b", "max_tokens": 5}': "would be ignored beside completion",
    '{"prompt": "a", "completion": "b", "answer": 0}': "answer: belongs to choices",
    '{"prompt": "a", "completion": "b", "answers": ["c"]}': "found completion and answers",
    '{"prompt": "a", "question": "b", "completion": "c"}': "found prompt and question",
    '{"completion": "c"}': "give one of prompt, question; found none",
    '{"prompt": "a"}': "give one of choices, completion, answers; found none",
    '{"prompt": "a", "answers": []}': "give one at least",
    '{"prompt": "a", "answers": ["b"], "stop": ""}': "stop: a text of at least one character",
    '{"prompt": "a", "answers": ["b"], "max_tokens": 0}': "max_tokens",
    '{"prompt": "a", "completion": "b"}': "line 2 is cloze and line 1 is multiple_choice",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named(write, line):
    path = write(GOOD, line)
    with pytest.raises(DataError, match=re.escape(BAD[line])) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}: line 2")


def test_files_that_are_none(write, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_task(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="holds no items"):
        read_task(write("", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 15"):
        read_task(tmp_path / "latin.jsonl")
    task = read_task(write(GOOD, GOOD.replace("a", "b", 1), name="two.jsonl"))
    with pytest.raises(DataError, match="two.jsonl: line 1: 2 shots were asked for, and .* has 1 other items"):
        prompts(read_task(write(*CAPITALS[:2], name="two.jsonl")), shots=2)
    with pytest.raises(DataError, match="cloze, and .* is multiple_choice"):
        prompts(task, 1, read_task(write({"prompt": "a", "completion": "b"}, name="cloze.jsonl")))
