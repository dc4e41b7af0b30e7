"""Blocks are found again by what they hold, and by nothing less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from history_model import HistoryModel, alone, choices, run_engine

from tokenstep.engine import Engine, Request
from tokenstep.engine.block_manager import BlockManager
from tokenstep.engine.prefix_cache import PrefixCache, first_key, next_key
from tokenstep.sampling import SamplingParams

MakeEngine = Callable[..., Engine]
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=11)


def keys_of(tokens: list[int], size: int = 4, seed: bytes = b"") -> list[bytes]:
    keys = [first_key(seed)]
    for begin in range(0, len(tokens) - size + 1, size):
        keys.append(next_key(keys[-1], tokens[begin : begin + size]))
    return keys[1:]


def test_a_key_depends_on_every_token_before_its_end_and_on_the_seed() -> None:
    tokens = list(range(12))
    plain = keys_of(tokens)
    for position in range(12):
        changed = keys_of([*tokens[:position], 99, *tokens[position + 1 :]])
        same = [old == new for old, new in zip(plain, changed, strict=True)]
        assert same == [end <= position for end in (4, 8, 12)]
    assert not set(plain) & set(keys_of(tokens, seed=b"adapter"))
    assert len(set(keys_of([1] * 12))) == 3


def test_the_longest_known_prefix_is_found() -> None:
    cache = PrefixCache()
    for block, key in enumerate([b"a", b"b", b"d"]):
        cache.insert(block, key)
    assert cache.find([b"a", b"b", b"c", b"d"]) == [0, 1]
    assert cache.find([b"c", b"a"]) == []
    cache.insert(7, b"a")
    assert cache.find([b"a"]) == [0]
    cache.remove(0)
    assert cache.find([b"a", b"b"]) == []
    assert 0 not in cache
    assert len(cache) == 2


class TestEviction:
    def filled(self, blocks: BlockManager, name: str, count: int = 2) -> list[int]:
        table: list[int] = []
        blocks.grow(table, 4 * count)
        for index, block in enumerate(table):
            blocks.remember(block, f"{name}{index}".encode())
        return table

    def test_blocks_without_contents_go_first_then_the_least_recently_used(self) -> None:
        blocks = BlockManager(6, 4)
        first, second = self.filled(blocks, "first"), self.filled(blocks, "second")
        blocks.free(first)
        blocks.free(second)
        assert (blocks.num_free, blocks.num_reusable) == (6, 4)
        blocks.free(blocks.reuse([b"first0", b"first1"]))  # used again: now the second is the older
        taken: list[int] = []
        blocks.grow(taken, 8)
        assert blocks.num_reusable == 4
        blocks.grow(taken, 16)
        assert blocks.reuse([b"second0", b"second1"]) == []
        assert len(blocks.reuse([b"first0", b"first1"])) == 2

    def test_the_end_of_a_sequence_goes_before_its_beginning(self) -> None:
        blocks = BlockManager(3, 4)
        blocks.free(self.filled(blocks, "a", 3))
        taken: list[int] = []
        blocks.grow(taken, 4)
        assert len(blocks.reuse([b"a0", b"a1", b"a2"])) == 2

    def test_a_block_in_use_is_never_evicted(self) -> None:
        blocks = BlockManager(2, 4)
        held = self.filled(blocks, "a", 2)
        again = blocks.reuse([b"a0"])
        blocks.free(held)
        assert blocks.num_free == 1
        blocks.grow(taken := [], 4)
        assert taken != again
        assert blocks.holders(again[0]) == 1
        blocks.free(again)
        assert blocks.num_reusable == 1


def generate(engine: Engine, prompt: list[int], **fields: object) -> tuple[list[int], int]:
    """The tokens of one request, and the prompt tokens that were found."""
    before = engine.counters.cached_tokens
    request = Request(prompt=prompt, choices=[SAMPLED], max_tokens=6, **fields)  # type: ignore[arg-type]
    (generated,) = run_engine(engine, [request])
    assert generated.tokens[0] == alone(request, 0)
    return generated.tokens[0], engine.counters.cached_tokens - before


def test_a_prompt_computed_before_is_found_but_for_its_last_token(
    make_engine: MakeEngine, model: HistoryModel
) -> None:
    engine = make_engine()
    prompt = list(range(10))
    assert generate(engine, prompt)[1] == 0
    assert model.prompt_tokens == 10
    assert generate(engine, prompt)[1] == 8
    assert model.prompt_tokens == 12
    assert generate(engine, prompt[:8])[1] == 4  # the last token is always computed, with its block
    assert generate(engine, [*prompt[:8], 40, 41])[1] == 8
    assert generate(engine, [49, *prompt[1:]])[1] == 0


def test_generated_tokens_are_found_as_the_prompt_of_the_next_turn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(10))
    output, _ = generate(engine, prompt)
    assert generate(engine, [*prompt, *output, 7])[1] == 12  # 15 tokens are stored: 3 full blocks


def test_another_seed_of_the_chain_shares_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine()
    generate(engine, list(range(10)))
    assert generate(engine, list(range(10)), cache_seed=b"adapter")[1] == 0
    assert generate(engine, list(range(10)), cache_seed=b"adapter")[1] == 8


def test_it_can_be_turned_off(make_engine: MakeEngine) -> None:
    engine = make_engine(prefix_cache=False)
    generate(engine, list(range(10)))
    assert generate(engine, list(range(10)))[1] == 0
    assert engine.blocks.num_reusable == 0


def test_a_prompt_that_is_scored_is_computed_whole(make_engine: MakeEngine, model: HistoryModel) -> None:
    engine = make_engine()
    prompt = list(range(10))
    plain = Request(prompt=prompt, choices=[SAMPLED], max_tokens=0, prompt_logprobs=0)
    (first,) = run_engine(engine, [plain])
    again = Request(prompt=prompt, choices=[SAMPLED], max_tokens=0, prompt_logprobs=0)
    (second,) = run_engine(engine, [again])
    assert first.prompt_logprobs == second.prompt_logprobs
    assert len(first.prompt_logprobs or ()) == 9
    assert (engine.counters.cached_tokens, model.prompt_tokens) == (0, 20)


@pytest.mark.parametrize("count", [1, 4])
def test_many_requests_with_one_prompt_prefix_store_it_once(make_engine: MakeEngine, count: int) -> None:
    engine = make_engine(max_batch=16)
    system = list(range(16))
    run_engine(engine, [Request(prompt=[*system, 30], choices=[SAMPLED], max_tokens=1)])
    for i in range(8):
        request = Request(prompt=[*system, 20 + i], choices=choices(count, SAMPLED), max_tokens=4)
        engine.add(request)
    engine.step()
    # the 4 blocks of the prefix, and for each choice one of its own, taken when it first writes
    assert engine.blocks.num_blocks - engine.blocks.num_free <= 4 + 8
