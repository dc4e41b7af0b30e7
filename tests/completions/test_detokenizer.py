"""Text from tokens, one at a time."""

from __future__ import annotations

import pytest
from byte_tokenizer import BEGIN, END, WORDS, ByteTokenizer
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.completions.logprobs import OffsetCounter, token_text
from tokenstep.completions.stream import IncrementalDetokenizer

THE = 256 + WORDS.index(b" the")
TOKENS = st.lists(st.integers(0, BEGIN), max_size=30)
TEXT_TOKENS = st.text(max_size=10).map(lambda text: list(text.encode()))


@given(tokens=TOKENS, skip=st.booleans(), strips=st.booleans())
def test_all_pieces_together_are_the_decoded_text(tokens: list[int], skip: bool, strips: bool) -> None:
    tokenizer = ByteTokenizer(strips)
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.flush()
    assert text == tokenizer.decode(tokens, skip)


@given(tokens=TEXT_TOKENS)
def test_only_half_characters_are_held_back(tokens: list[int]) -> None:
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    text = ""
    for count, token in enumerate(tokens, 1):
        text += detokenizer.push(token)
        assert text == bytes(tokens[:count]).decode("utf-8", "ignore")


@given(tokens=TOKENS, cut=st.integers(0, 30))
def test_a_fork_goes_on_from_the_same_place(tokens: list[int], cut: int) -> None:
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    text = "".join(detokenizer.push(token) for token in tokens[:cut])
    twin = detokenizer.fork()
    rest = [detokenizer.push(token) for token in tokens[cut:]]
    assert rest == [twin.push(token) for token in tokens[cut:]]
    assert text + "".join(rest) + twin.flush() == ByteTokenizer().decode(tokens)


def test_a_control_token_inside_a_character_does_not_break_it() -> None:
    detokenizer = IncrementalDetokenizer(ByteTokenizer())
    first, second = "é".encode()
    assert [detokenizer.push(token) for token in (first, END, second)] == ["", "", "é"]


@given(tokens=TOKENS, strips=st.booleans())
def test_offsets_count_code_points_of_token_texts(tokens: list[int], strips: bool) -> None:
    tokenizer = ByteTokenizer(strips)
    counter = OffsetCounter(tokenizer, skip_special_tokens=False)
    for count, token in enumerate(tokens):
        offset = counter.push(token)
        before = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
        assert offset == sum(len(before.push(earlier)) for earlier in tokens[:count])


def test_control_tokens_that_the_text_leaves_out_count_and_the_space_behind_them_does_not() -> None:
    counter = OffsetCounter(ByteTokenizer(strips_first_space=True), skip_special_tokens=True)
    assert [counter.push(token) for token in (BEGIN, THE, END, THE, ord("x"))] == [0, 3, 6, 10, 14]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b" the", " the"),
        ("€".encode(), "€"),
        ("€".encode()[:2], "bytes:\\xe2\\x82"),
        (b" \xc3", "bytes: \\xc3"),
        (b"\\\xff\n", "bytes:\\x5c\\xff\\x0a"),
        (b"", ""),
    ],
)
def test_bytes_that_are_no_whole_characters_are_written_as_bytes(data: bytes, text: str) -> None:
    assert token_text(data) == text
