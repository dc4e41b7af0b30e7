"""One choice: pieces of text, their log probabilities, and how it ends."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import BEGIN, END, WORDS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.completions.choice import ChoiceBuilder, Piece
from tokenstep.completions.logprobs import Entry, OffsetCounter, format_logprobs
from tokenstep.completions.schema import Logprobs, TokenLogprob, TopLogprob
from tokenstep.completions.stream import IncrementalDetokenizer
from tokenstep.engine import TokenLogprobs

STOP, S, TO = 256 + WORDS.index(b"stop"), 256 + WORDS.index(b"s"), 256 + WORDS.index(b"to")
LOGPROBS = TokenLogprobs(-1.0, 1, [], [])


def builder(*stops: str, min_tokens: int = 0, skip_special_tokens: bool = True) -> ChoiceBuilder:
    tokenizer = ByteTokenizer()
    return ChoiceBuilder(
        IncrementalDetokenizer(tokenizer, skip_special_tokens),
        OffsetCounter(tokenizer),
        stops=stops,
        min_tokens=min_tokens,
        stop_reasons={END: None, ord("!"): ord("!")},
    )


def feed(choice: ChoiceBuilder, tokens: list[int], last: str | None = None) -> list[Piece]:
    """Pushes tokens until the choice is finished; the last one ends it with reason `last`."""
    pieces = []
    for index, token in enumerate(tokens):
        is_last = index == len(tokens) - 1
        pieces.append(choice.push(token, LOGPROBS, last if is_last else None))
        if choice.finished:
            break
    return pieces


def joined(pieces: list[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole.add(piece)
    return whole


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    whole = joined(feed(builder("stop"), [*b"ab", S, TO, ord("p"), ord("x")]))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("ab", "stop", "stop")


def test_tokens_of_the_stop_string_have_no_entry() -> None:
    pieces = feed(builder("stop"), [*b"ab", S, TO, ord("p")])
    assert [entry.token for entry in joined(pieces).entries] == [*b"ab"]
    assert [len(piece.entries) for piece in pieces] == [1, 1, 0, 0, 0]


def test_a_token_that_reaches_into_the_stop_string_keeps_its_entry() -> None:
    whole = joined(feed(builder("op"), [STOP]))
    assert whole.text == "st"
    assert [entry.token for entry in whole.entries] == [STOP]


def test_all_generated_ids_are_reported_even_behind_the_stop() -> None:
    assert joined(feed(builder("stop"), [S, TO, ord("p")])).token_ids == [S, TO, ord("p")]


def test_entries_wait_for_their_text() -> None:
    pieces = feed(builder("stop"), [S, TO, ord("x")])
    assert [len(piece.entries) for piece in pieces] == [0, 0, 3]
    assert [piece.text for piece in pieces] == ["", "", "stox"]


def test_the_end_token_has_an_entry_but_no_text() -> None:
    whole = joined(feed(builder(skip_special_tokens=False), [*b"ab", END], last="stop"))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("ab", "stop", None)
    assert [entry.token for entry in whole.entries] == [*b"ab", END]


def test_a_stop_token_gives_its_id_as_the_reason_and_no_text() -> None:
    whole = joined(feed(builder(), [*b"ab!"], last="stop"))
    assert (whole.text, whole.stop_reason) == ("ab", ord("!"))


def test_text_held_back_comes_out_at_the_end() -> None:
    whole = joined(feed(builder("stop"), [S, TO], last="length"))
    assert (whole.text, whole.finish_reason) == ("sto", "length")
    assert len(whole.entries) == 2


def test_half_a_character_at_the_end_is_a_replacement_character() -> None:
    assert joined(feed(builder(), [ord("a"), 0xE2, 0x82], last="length")).text == "a\ufffd"


def test_a_stop_string_in_the_last_token_wins_over_length() -> None:
    whole = joined(feed(builder("op"), [STOP], last="length"))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("st", "stop", "op")


def test_stop_strings_count_from_min_tokens_on() -> None:
    pieces = feed(builder("b", min_tokens=3), [*b"ababab"])
    assert joined(pieces).text == "aba"
    assert len(pieces) == 4


def test_parts_of_a_character_have_entries_at_its_offset() -> None:
    whole = joined(feed(builder(), [ord("a"), *"€".encode(), ord("b")], last="length"))
    assert [entry.offset for entry in whole.entries] == [0, 1, 1, 1, 2]
    formatted = format_logprobs(whole.entries, ByteTokenizer())
    assert formatted.tokens == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]


def test_a_character_cut_off_by_a_stop_has_no_entries() -> None:
    whole = joined(feed(builder("€"), [ord("a"), *"€".encode()]))
    assert whole.text == "a"
    assert [entry.token for entry in whole.entries] == [ord("a")]


@given(
    tokens=st.lists(
        st.one_of(st.sampled_from([STOP, S, TO, END, BEGIN, *b"stop"]), st.integers(0, BEGIN)), min_size=1
    ),
    stops=st.lists(st.sampled_from(["stop", "op", "tos", "ss", "é"]), max_size=3),
    last=st.sampled_from(["stop", "length"]),
)
def test_pieces_never_show_a_stop_string_and_entries_begin_in_the_text(
    tokens: list[int], stops: list[str], last: str
) -> None:
    whole = joined(feed(builder(*stops), tokens, last))
    assert not any(stop in whole.text for stop in stops) or whole.text.endswith("\ufffd")
    tokenizer = ByteTokenizer()
    shown = (
        whole.token_ids[:-1]
        if whole.finish_reason == "stop" and whole.stop_reason is None
        else whole.token_ids
    )
    assert tokenizer.decode(shown).startswith(whole.text.removesuffix("\ufffd"))
    if whole.finish_reason == "length":
        assert len(whole.entries) == len(tokens)
        assert whole.text == tokenizer.decode(tokens)
    if isinstance(whole.stop_reason, str):
        assert len(whole.entries) <= len(whole.token_ids)
        assert all(entry.token == token for entry, token in zip(whole.entries, whole.token_ids, strict=False))


class TestFormat:
    def entry(self, token: int, logprob: float, top: list[tuple[int, float]]) -> Entry:
        found = TokenLogprobs(logprob, 1, [token for token, _ in top], [value for _, value in top])
        return Entry(token, 0, found)

    def test_both_forms_have_the_same_numbers(self) -> None:
        formatted = format_logprobs([self.entry(97, -0.5, [(97, -0.5), (98, -1.5)])], ByteTokenizer())
        assert formatted.token_logprobs == [-0.5]
        assert formatted.top_logprobs == [{"a": -0.5, "b": -1.5}]
        top = [TopLogprob("a", -0.5, (97,)), TopLogprob("b", -1.5, (98,))]
        assert formatted.content == [TokenLogprob("a", -0.5, (97,), top)]
        assert json.loads(formatted.model_dump_json())["content"][0] == {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.5, "bytes": [97]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        }
        assert Logprobs.model_validate_json(formatted.model_dump_json()) == formatted

    def test_the_chosen_token_is_among_the_top_ones_even_if_unlikely(self) -> None:
        formatted = format_logprobs([self.entry(97, -7.0, [(98, -0.1)])], ByteTokenizer())
        assert formatted.top_logprobs == [{"b": -0.1, "a": -7.0}]
        assert [top.token for top in formatted.content[0].top_logprobs] == ["b"]

    def test_of_two_ids_with_equal_text_the_larger_value_stays(self) -> None:
        formatted = format_logprobs([self.entry(S, -3.0, [(ord("s"), -0.5), (S, -3.0)])], ByteTokenizer())
        assert formatted.top_logprobs == [{"s": -0.5}]
        assert formatted.token_logprobs == [-3.0]
        assert [top.logprob for top in formatted.content[0].top_logprobs] == [-0.5, -3.0]

    @pytest.mark.parametrize("value", [float("-inf"), float("nan")])
    def test_minus_infinity_is_written_as_a_number(self, value: float) -> None:
        formatted = format_logprobs([self.entry(97, value, [(97, value)])], ByteTokenizer())
        assert formatted.token_logprobs == [-9999.0]
        assert formatted.top_logprobs == [{"a": -9999.0}]
        assert formatted.content[0].logprob == -9999.0

    def test_a_first_prompt_token_has_no_content(self) -> None:
        formatted = format_logprobs([Entry(97, 0, None)], ByteTokenizer())
        assert formatted.tokens == ["a"]
        assert formatted.token_logprobs == [None]
        assert formatted.top_logprobs == [None]
        assert formatted.content == []
