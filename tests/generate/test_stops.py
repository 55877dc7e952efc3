"""Stop strings: the same text whatever pieces it comes in, and nothing of a stop string ever shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import SettingsError
from jaxllm.generate.stops import StopFinder, check_stop


def plain(text, stops):
    """The text before the stop string that is complete first; the longest of those."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


few = st.text("abc", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(few, max_size=3))
def test_pieces_do_not_matter_and_no_part_of_a_stop_string_is_shown(pieces, stops):
    finder, shown = StopFinder(stops), ""
    wanted, found = plain("".join(pieces), stops)
    for piece in pieces:
        shown += finder.push(piece)
        assert wanted.startswith(shown)
    assert shown + finder.flush() == wanted and finder.found == found


@given(st.lists(few, max_size=6), st.lists(few, min_size=1, max_size=3))
def test_no_more_is_held_back_than_must_be(pieces, stops):
    """What is held back is the start of a stop string: with the rest of it, it would not have been shown."""
    finder, shown = StopFinder(stops), ""
    for piece in pieces:
        shown += finder.push(piece)
    held = "".join(pieces)[len(shown) :]
    assert finder.found or not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_by_hand():
    finder = StopFinder(("\n\n", "END"))
    assert [finder.push(x) for x in ("one\n", "two E", "ND", "more")] == ["one", "\ntwo ", "", ""]
    assert finder.found and finder.flush() == ""
    finder = StopFinder(("abcd", "b"))
    assert finder.push("xa") == "x" and finder.push("b") == "a" and finder.found  # "b" is complete first


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_what_cannot_stop_is_refused(stop):
    with pytest.raises(SettingsError, match="at least one character"):
        check_stop(stop)


def test_one_string_is_not_its_letters():
    assert check_stop("END") == ("END",) and check_stop(["a", "b"]) == ("a", "b")
