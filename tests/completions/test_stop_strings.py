"""Stop strings: where text ends, and what is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.completions.stream import StopChecker

LETTERS = st.text(alphabet="ab", max_size=12)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """(text before, stop) by the definition: of those complete at the earliest character the longest."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return None


def could_become_stop(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop."""
    return max(
        (size for size in range(1, len(text) + 1) for stop in stops if stop.startswith(text[-size:])),
        default=0,
    )


@given(pieces=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_text_ends_before_the_first_complete_stop_however_it_is_cut_into_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    checker = StopChecker(stops)
    released, ended_by = "", None
    for piece in pieces:
        text, ended_by = checker.push(piece)
        released += text
        if ended_by is not None:
            break
    expected = first_stop("".join(pieces), stops)
    if expected is None:
        assert ended_by is None
        assert released + checker.flush() == "".join(pieces)
    else:
        assert (released, ended_by) == expected


@given(pieces=st.lists(LETTERS, max_size=6), stops=STOPS)
def test_exactly_what_could_still_become_a_stop_is_held_back(pieces: list[str], stops: list[str]) -> None:
    checker = StopChecker(stops)
    released, pushed = "", ""
    for piece in pieces:
        text, ended_by = checker.push(piece)
        if ended_by is not None:
            return
        released, pushed = released + text, pushed + piece
        assert released == pushed[: len(pushed) - could_become_stop(pushed, stops)]


@given(before=st.lists(LETTERS, max_size=4), after=st.lists(LETTERS, max_size=4), stops=STOPS)
def test_a_stop_completed_too_early_is_text_and_one_completed_later_counts(
    before: list[str], after: list[str], stops: list[str]
) -> None:
    checker = StopChecker(stops)
    released, ended_by = "", None
    for piece in before:
        text, ended_by = checker.push(piece, may_stop=False)
        assert ended_by is None
        released += text
    for piece in after:
        text, ended_by = checker.push(piece)
        released += text
        if ended_by is not None:
            break
    early, text = len("".join(before)), "".join(before + after)
    ends = [
        end for end in range(early + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)
    ]
    if not ends:
        assert ended_by is None
        assert released + checker.flush() == text
    else:
        assert released + str(ended_by) == text[: ends[0]]


@pytest.mark.parametrize("stops", [[], ["stop"]])
def test_without_a_match_the_text_is_what_came_in(stops: list[str]) -> None:
    checker = StopChecker(stops)
    assert checker.push("some text") == ("some text", None)
    assert checker.flush() == ""


def test_a_partial_stop_is_held_back_and_released_when_it_turns_out_to_be_none() -> None:
    checker = StopChecker(["\n\n"])
    assert checker.push("a\n") == ("a", None)
    assert checker.push("b") == ("\nb", None)


def test_of_stops_complete_at_the_same_character_the_longest_counts() -> None:
    assert StopChecker(["b", "ab"]).push("xab") == ("x", "ab")


def test_the_stop_complete_first_counts_even_inside_a_longer_one() -> None:
    assert StopChecker(["abcd", "bc"]).push("abcd") == ("a", "bc")


def test_a_long_repetitive_stop_costs_time_proportional_to_the_text() -> None:
    checker = StopChecker(["a" * 20000 + "b"])
    text = "".join(checker.push("a" * 5000)[0] for _ in range(10))
    assert text == "a" * 30000
    assert checker.push("b") == ("", "a" * 20000 + "b")
