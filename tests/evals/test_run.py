"""Metrics of task files against sums by hand, and their standard errors."""

import dataclasses
import math

import numpy as np
import pytest
import tiny

from jaxllm.errors import DataError
from jaxllm.evals.run import mean_stderr, ratio_stderr, run_task
from jaxllm.evals.score import encode_pair
from jaxllm.evals.tasks import prompts, read_task
from jaxllm.generate.text import generate_text


def ask(loaded, path, shots=0, **options):
    task = read_task(path)
    return run_task(loaded, task, prompts(task, shots), **options)


def test_standard_errors_by_hand():
    assert mean_stderr([True, False, True, True]) == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 3)))
    assert mean_stderr([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2) / math.sqrt(3)))
    assert mean_stderr([1.0]) == (1.0, None) and ratio_stderr([6.0], [4]) == (1.5, None)
    assert ratio_stderr([2.0, 6.0], [1, 3]) == (2.0, 0.0), "the same rate everywhere"
    ratio, error = ratio_stderr([1.0, 5.0], [2, 2])
    assert ratio == 1.5 and error == pytest.approx(mean_stderr([0.5, 2.5])[1]), "equal sizes: the mean of the rates"


def test_multiple_choice_by_hand(loaded, write):
    choices = ["dog", "the lazy dog jumps", "fox", "maybe no"]
    items = [{"prompt": p, "choices": choices, "answer": a} for p, a in [("the", 0), ("over the", 1), ("is", 3)]]
    found = ask(loaded, write(*items), batch=5)
    plain, normalised = [], []
    for item in items:
        pairs = [encode_pair(loaded.tokenizer, item["prompt"], " " + choice) for choice in choices]
        nats = np.array([loaded.by_hand(*pair)[0] for pair in pairs])
        plain.append(nats.argmax() == item["answer"])
        normalised.append((nats / [3, 18, 3, 8]).argmax() == item["answer"])
    assert (found["acc"], found["acc_stderr"]) == mean_stderr(plain)
    assert (found["acc_norm"], found["acc_norm_stderr"]) == mean_stderr(normalised)
    assert found["kind"] == "multiple_choice" and found["items"] == 3


def test_length_decides_for_a_uniform_model(uniform, write):
    """The fewest tokens win by log-likelihood, the most bytes a token by bytes."""
    short, long = "Q", " the lazy dog sleeps"  # a byte is a token here; words are, too
    tokens = [len(encode_pair(uniform.tokenizer, "A", text).continuation) for text in (" " + short, long)]
    assert tokens[0] < tokens[1] and tokens[0] / 1 > tokens[1] / len(long.strip()), "the premise"
    found = ask(uniform, write({"prompt": "A", "choices": [short, long], "answer": 1}))
    assert (found["acc"], found["acc_norm"], found["acc_stderr"]) == (0.0, 1.0, None)


def test_cloze_by_hand(loaded, uniform, write):
    texts = [("the quick", "brown fox"), ("over the ", "lazy dog"), ("is", "it not é")]
    path = write(*({"prompt": p, "completion": c} for p, c in texts))
    found = ask(loaded, path)
    nats = [loaded.by_hand(*encode_pair(loaded.tokenizer, p.strip(), " " + c))[0] for p, c in texts]
    assert found["loglikelihood"] == pytest.approx(np.mean(nats), rel=1e-5)
    sizes = [10, 9, 10]  # the space before counts, since it is scored
    assert found["bits_per_byte"] == pytest.approx(-sum(nats) / math.log(2) / sum(sizes), rel=1e-5)
    assert found["bits_per_byte_stderr"] == pytest.approx(ratio_stderr(np.divide(nats, -math.log(2)), sizes)[1])
    assert found["acc"] == 0
    tokens = sum(len(encode_pair(loaded.tokenizer, p.strip(), " " + c).continuation) for p, c in texts)
    assert ask(uniform, path)["bits_per_byte"] == pytest.approx(tokens * math.log2(310) / sum(sizes), rel=1e-5)


def test_cloze_counts_what_greedy_decoding_says(loaded, write):
    parts = loaded.model, loaded.decoding, loaded.tokenizer
    for prompt in ("the", "dog", "over the", "is it", "no", "yes", "maybe", "A fox"):
        made = generate_text(*parts, [prompt], max_tokens=2, temperature=0)[0]
        if made.text.strip() == made.text and encode_pair(loaded.tokenizer, prompt, made.text).continuation == made.ids:
            break
    else:
        raise AssertionError("what this model says is never how its text is tokenised")
    items = [{"prompt": prompt, "completion": text, "join": ""} for text in (made.text, made.text + "@")]
    assert ask(loaded, write(*items))["acc"] == 0.5


def test_exact_match_is_greedy_text_up_to_the_stop_string(loaded, write):
    def said(prompt, **options):
        options |= dict(max_tokens=6, temperature=0)
        return generate_text(loaded.model, loaded.decoding, loaded.tokenizer, [prompt], **options)[0].text

    whole = said("the quick")
    stop = whole[len(whole) // 2]
    before = said("the quick", stop=stop).strip()
    assert whole.strip() != before, "the premise"
    base = {"prompt": "the quick", "max_tokens": 6, "stop": ["\0"]}
    items = [
        base | {"answers": ["no", f" {whole.strip()}\n"]},
        base | {"answers": [before or "@"], "stop": stop} if before else base | {"answers": [whole]},
        base | {"answers": [whole + "!"]},
        base | {"prompt": "over the lazy", "answers": [said("over the lazy")]},
    ]
    found = ask(loaded, write(*items), batch=3)
    assert found["exact_match"] == 0.75 and found["exact_match_stderr"] == pytest.approx(0.25)


def test_examples_before_the_question_are_read(loaded, write):
    items = [{"prompt": p, "completion": "the dog"} for p in ("no", "yes", "maybe")]
    none, one = (ask(loaded, write(*items), shots=shots) for shots in (0, 1))
    shown = "yes the dog\n\nno"
    nats = [
        loaded.by_hand(*encode_pair(loaded.tokenizer, p, " the dog"))[0]
        for p in (shown, *["no the dog\n\n" + p for p in ("yes", "maybe")])
    ]
    assert one["loglikelihood"] == pytest.approx(np.mean(nats), rel=1e-5) != none["loglikelihood"]


def test_an_item_too_long_is_named_with_both_lengths(loaded, write):
    good = {"prompt": "the", "completion": "dog"}
    with pytest.raises(DataError, match=r"line 2: \d\d+ tokens of context and \d+ to score .* context of 48"):
        ask(loaded, write(good, {"prompt": "the dog " * 60, "completion": "x"}))
    with pytest.raises(DataError, match=r"line 1: \d+ tokens of prompt and max_tokens=47 are more than .* 48"):
        ask(loaded, write({"prompt": "the dog", "answers": ["x"], "max_tokens": 47}))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_not_misread(loaded, write):
    small = tiny.one_device(tiny.config(vocab=50, context=48))
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        ask(
            dataclasses.replace(loaded, model=small, params=tiny.weights(small)),
            write({"prompt": "the", "completion": "dog"}),
        )
