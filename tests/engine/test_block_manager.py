"""Blocks: none leaked, none shared by tables that write to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tokenstep.engine.block_manager import BlockManager, OutOfBlocks

NUM_BLOCKS = 12
BLOCK_SIZE = 4


class Tables(RuleBasedStateMachine):
    """Tables grow, fork, write and go, and every write lands in a copy of the cache kept here."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.cache = [[0] * BLOCK_SIZE for _ in range(NUM_BLOCKS)]
        self.live: list[tuple[list[int], list[int]]] = []  # the blocks, and the tokens that should be in them
        self.next_token = 1

    @rule(target=tables)
    def begin(self) -> tuple[list[int], list[int]]:
        self.live.append(([], []))
        return self.live[-1]

    @rule(entry=tables, count=st.integers(0, 9))
    def append(self, entry: tuple[list[int], list[int]], count: int) -> None:
        table, tokens = entry
        before = list(table)
        try:
            self.blocks.grow(table, len(tokens) + count)
        except OutOfBlocks:
            assert table == before
            return
        for _ in range(count):
            try:
                copy = self.blocks.make_writable(table, len(tokens))
            except OutOfBlocks:
                return
            if copy:
                self.cache[copy[1]] = list(self.cache[copy[0]])
            self.cache[table[len(tokens) // BLOCK_SIZE]][len(tokens) % BLOCK_SIZE] = self.next_token
            tokens.append(self.next_token)
            self.next_token += 1

    @rule(target=tables, entry=tables)
    def fork(self, entry: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
        self.live.append((self.blocks.fork(entry[0]), list(entry[1])))
        return self.live[-1]

    @rule(entry=consumes(tables))
    def end(self, entry: tuple[list[int], list[int]]) -> None:
        self.live = [other for other in self.live if other is not entry]
        self.blocks.free(entry[0])
        assert entry[0] == []

    @invariant()
    def every_table_reads_what_it_wrote(self) -> None:
        for table, tokens in self.live:
            assert [self.cache[table[i // BLOCK_SIZE]][i % BLOCK_SIZE] for i in range(len(tokens))] == tokens

    @invariant()
    def every_block_is_free_or_held_by_as_many_tables_as_are_counted(self) -> None:
        held = [block for table, _ in self.live for block in table]
        assert self.blocks.num_free == NUM_BLOCKS - len(set(held))
        assert all(self.blocks.holders(block) == held.count(block) for block in range(NUM_BLOCKS))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(tokens=st.integers(0, 100), size=st.integers(1, 17))
def test_a_table_gets_just_enough_blocks(tokens: int, size: int) -> None:
    blocks = BlockManager(100, size)
    table: list[int] = []
    blocks.grow(table, tokens)
    assert len(table) * size >= tokens > (len(table) - 1) * size or tokens == len(table) == 0


def test_forks_share_all_blocks_until_one_writes() -> None:
    blocks = BlockManager(4, 2)
    first: list[int] = []
    blocks.grow(first, 3)
    second = blocks.fork(first)
    assert second == first
    assert blocks.num_free == 2
    assert blocks.make_writable(second, 3) == (first[1], second[1])
    assert second[0] == first[0]
    assert second[1] != first[1]
    assert blocks.make_writable(first, 3) is None


def test_too_many_blocks_are_refused_and_none_is_taken() -> None:
    blocks = BlockManager(3, 2)
    table: list[int] = []
    with pytest.raises(OutOfBlocks, match="4 blocks are needed, 3 are free"):
        blocks.grow(table, 7)
    assert table == []
    assert blocks.num_free == 3
