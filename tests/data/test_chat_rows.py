"""Conversations from a file to rows: whole, apart, once an epoch, and only the assistant's tokens as targets."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.data.layout import best_fit, next_fit
from jaxllm.data.loader import Loader
from jaxllm.data.mixture import mix
from jaxllm.data.pack import Rows
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import Source
from jaxllm.data.store import TokenStore
from jaxllm.errors import DataError

LENGTH = 192


def records(count=40, seed=0):
    """Of one to three questions and answers, each conversation with words of its own."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        turns = []
        for _ in range(rng.integers(1, 4)):
            turns.append({"role": "user", "content": f"question {i} " + "why " * int(rng.integers(0, 6))})
            turns.append({"role": "assistant", "content": f"answer {i} " + "so " * int(rng.integers(0, 6))})
        yield {"messages": turns}


@pytest.fixture
def store(make_chats):
    return make_chats(records())


def segments(rows, epoch=0):
    """`(tokens, targets, mask)` of each conversation that an epoch's rows hold."""
    for r in range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch):
        row = rows.row(r)
        for segment in range(1, row.segments.max() + 1):
            here = row.segments == segment
            np.testing.assert_array_equal(row.positions[here], np.arange(here.sum()))
            yield row.tokens[here], row.targets[here], row.mask[here]


def ids(store, i):
    return tuple(store.doc(i).tolist())


@pytest.mark.fast
@pytest.mark.parametrize("options", [{}, {"shuffle": False}, {"pack": False}], ids=["packed", "in order", "unpacked"])
def test_every_conversation_is_whole_and_once_an_epoch(store, options):
    assert store.lengths.max() <= LENGTH
    rows = Rows(store, LENGTH, seed=1, **options)
    wanted = Counter(ids(store, i) for i in range(store.documents))
    for epoch in (0, 3):
        found = Counter((int(tokens[0]), *targets.tolist()) for tokens, targets, _ in segments(rows, epoch))
        assert found == wanted
    assert rows.cut == (0, 0) and rows.news == "" and rows.targets == store.targets.sum()
    used = sum(len(tokens) for tokens, _, _ in segments(rows))
    assert rows.padding == pytest.approx(1 - used / (rows.per_epoch * LENGTH))


def test_only_what_the_assistant_says_is_a_target(store, tokenizer):
    end, assistant = tokenizer.id("<|end|>"), tokenizer.id("<|assistant|>")
    for tokens, targets, mask in segments(Rows(store, LENGTH)):
        said = tokenizer.decode(targets[mask == 1], skip_special=False).split("<|end|>")
        assert all(turn.startswith("answer") for turn in said[:-1]) and said[-1] == ""
        read = tokenizer.decode(targets[mask == 0], skip_special=False)
        assert "answer" not in read and read.count("question") == read.count("<|assistant|>") == len(said) - 1
        # the first target of a turn follows the template's <|assistant|>, the last one is its <|end|>
        starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
        assert (tokens[starts] == assistant).all()
        assert (targets[np.flatnonzero(np.diff(mask, append=0) == -1)] == end).all()
    assert set(np.unique(mask)) == {0, 1}


def test_rows_are_a_pure_function_of_seed_and_number(store):
    rows, again = Rows(store, LENGTH, seed=5), Rows(store, LENGTH, seed=5)
    drawn = {int(r): rows.row(int(r)) for r in np.random.default_rng(0).permutation(3 * rows.per_epoch)}
    for r in range(3 * rows.per_epoch):
        for a, b in zip(drawn[r], again.row(r), strict=True):
            np.testing.assert_array_equal(a, b)
    epochs = [np.stack([rows.row(e * rows.per_epoch + k).tokens for k in range(rows.per_epoch)]) for e in (0, 1)]
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != Rows(store, LENGTH, seed=6).row(0).tokens).any()
    others = [{"seed": 6}, {"pack": False}, {"truncate": "left"}, {"shuffle": False}]
    assert len({rows.fingerprint, *(Rows(store, LENGTH, **{"seed": 5} | o).fingerprint for o in others)}) == 5


def test_not_shuffled_conversations_follow_the_file(store):
    found = [int(tokens[1:].sum()) for tokens, _, _ in segments(Rows(store, LENGTH, shuffle=False))]
    assert found == [int(store.doc(i)[1:-1].sum()) for i in range(store.documents)]


@pytest.mark.fast
def test_best_fit_is_tight_and_next_fit_keeps_the_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 2000)
    for row_of in (best_fit(-np.sort(-lengths), 100), next_fit(lengths, 100)):
        assert sorted(set(row_of.tolist())) == list(range(row_of.max() + 1))
    fitted = -np.sort(-lengths)
    held = np.bincount(best_fit(fitted, 100), weights=fitted)
    assert held.max() <= 100 and len(held) <= 1.01 * lengths.sum() / 100 + 1
    row_of = next_fit(lengths, 100)
    assert np.bincount(row_of, weights=lengths).max() <= 100 and (np.diff(row_of) >= 0).all()
    assert best_fit(np.array([7, 5, 3, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_the_rows_and_a_run_goes_on_at_the_row(store, make_store, processes):
    text = make_store([f"text {i} " * 9 for i in range(40)])
    stream = mix({"chats": store, "text": text}, {"chats": 1, "text": 1}, LENGTH, seed=1)
    wanted = [stream.row(r) for r in range(32)]
    for start in (0, 5):
        loaders = [Loader(stream, 8, start=start, process=p, processes=processes) for p in range(processes)]
        found = [np.concatenate([next(loader).mask_BT for loader in loaders]) for _ in range(3)]
        np.testing.assert_array_equal(np.concatenate(found), [row.mask for row in wanted[start : start + 24]])
        for loader in loaders:
            loader.close()


def long_ones(make_chats, tokenizer, words=200):
    """Three: one that fits, one with a long answer, one with a long question."""
    pair = lambda prompt, said: {"prompt": prompt, "completion": said}  # noqa: E731
    return make_chats([pair("hi", "yo"), pair("q", "so " * words), pair("why " * words, "end")])


@pytest.mark.parametrize("pack", [True, False])
def test_truncation(make_chats, tokenizer, pack):
    store = long_ones(make_chats, tokenizer)
    assert store.targets[2] < 5 and store.targets[1] > 100

    def rows(truncate):
        return Rows(store, 32, truncate=truncate, pack=pack, shuffle=False)

    held = {t: [(int(x[0]), *y.tolist()) for x, y, _ in segments(rows(t))] for t in ("right", "left", "drop")}
    assert held["right"] == [ids(store, 0), ids(store, 1)[:33]]
    assert held["left"] == [ids(store, 0), ids(store, 1)[-33:], ids(store, 2)[-33:]]
    assert held["drop"] == [ids(store, 0)]
    lost = store.tokens - 3 - sum(len(x) - 1 for x in held["right"])
    assert rows("right").cut == (2, lost)
    assert rows("right").news == (
        f"2 of 3 conversations are longer than 32 and are cut at the end; {lost:,} tokens unused, "
        f"{store.targets.sum() - rows('right').targets} of them to learn; 1 has nothing to learn left and "
        "is left out"
    )
    assert "cut at the start" in rows("left").news and "left out;" in rows("drop").news
    for truncate in held:
        assert rows(truncate).targets == sum(int(mask.sum()) for _, _, mask in segments(rows(truncate)))
    with pytest.raises(DataError, match=f"2 of 3 .* row of 32 .*set train.seq_len={store.lengths.max() - 1}, or"):
        rows("error")
    assert Rows(store, int(store.lengths.max()) - 1, truncate="error").news == ""


def test_nothing_left_is_an_error(make_chats):
    store = make_chats([{"prompt": "why " * 99, "completion": "yo"}])
    with pytest.raises(DataError, match="rows of 16 hold none of its conversations; raise train.seq_len"):
        Rows(store, 16)


def test_rows_of_another_length_begin_an_epoch(store):
    rows, longer = Rows(store, LENGTH), Rows(store, 2 * LENGTH)
    assert longer.go_on(rows, rows.per_epoch + 1) == 2 * longer.per_epoch
    assert Rows(store, LENGTH).go_on(rows, 7) == 7
    unpacked = [Rows(store, length, pack=False) for length in (LENGTH, 2 * LENGTH)]
    assert unpacked[1].go_on(unpacked[0], 7) == 7


def test_copies_are_held_out_together_whatever_the_template(tmp_path, tokenizer):
    lines = [json.dumps(record) for record in records(120)] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = Source(name="a", path=str(tmp_path / "a.jsonl"), format="chat")
    config = DataConfig(sources=(source,), heldout=0.2, cache=str(tmp_path / "cache"))
    plain = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}<|end|>{% endfor %}"
    halves = [prepare(config, t, say=lambda _: None) for t in (tokenizer, tokenizer.with_template(plain))]
    for stores in halves:
        rest, out = ({ids(store, i) for i in range(store.documents)} for store in stores.values())
        assert not rest & out and len(rest) + len(out) == 120 and 10 < len(out) < 40
        assert sum(store.targets.sum() for store in stores.values()) == sum(
            np.count_nonzero(store.learnt(i)[1:]) for store in stores.values() for i in range(store.documents)
        )
    assert [s.hashes.tolist() for s in halves[0].values()] == [s.hashes.tolist() for s in halves[1].values()]
    assert halves[0]["a"].fingerprint != halves[1]["a"].fingerprint


def test_a_store_is_made_once_and_damage_is_noticed(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records(9)))
    source = Source(name="a", path=str(tmp_path / "a.jsonl"), format="chat")
    config, said = DataConfig(sources=(source,), cache=str(tmp_path / "cache")), []
    store = prepare(config, tokenizer, say=said.append)["a"]
    assert prepare(config, tokenizer, say=said.append)["a"].fingerprint == store.fingerprint and len(said) == 1
    (shard,) = (tmp_path / "cache").glob("*/*.marks")
    assert shard.stat().st_size == store.tokens
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"marks: {store.tokens - 1} bytes, expected {store.tokens}"):
        TokenStore.open(shard.parent)
    shard.unlink()
    with pytest.raises(DataError, match="marks: damaged shard"):
        TokenStore.open(shard.parent)


def test_bytes_are_those_of_what_is_learnt(make_chats):
    store = make_chats([{"prompt": "hi there", "completion": "é yo"}, {"prompt": "x", "completion": ""}])
    assert store.bytes.tolist() == [5, 0] and store.targets.tolist()[1] == 1


def test_a_first_token_is_learnt_by_nobody(make_chats):
    """Nothing comes before it that could predict it."""
    whole = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}<|end|>"
    store = make_chats([{"prompt": "hi", "completion": "there"}], whole)
    assert store.learnt(0).tolist() == [True] * (store.tokens - 1) + [False]
    assert store.targets.tolist() == [store.tokens - 2] and Rows(store, 32).row(0).mask.sum() == store.tokens - 2


def test_turns_that_are_not_learnt_are_said_each_time(tmp_path, tokenizer):
    """The template says only the last turn as it was said."""
    forgets = tokenizer.with_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last or m.role == 'user' else '' }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records(9)))
    source = Source(name="a", path=str(tmp_path / "a.jsonl"), format="chat")
    turns = sum(len(record["messages"]) // 2 - 1 for record in records(9))
    for lines in (2, 1):
        said = []
        store = prepare(DataConfig(sources=(source,), cache=str(tmp_path / "c")), forgets, say=said.append)["a"]
        assert len(said) == lines and said[-1] == (
            f"source a: {turns} earlier turns of the assistant are not learnt: the chat template rewrites them"
        )
    assert store.untrained == turns > 3 and store.split(0.3)[0].untrained < turns
