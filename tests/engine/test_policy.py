"""Who computes what: pure functions of what there is and what is free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenstep.engine.policy import TokenBudget, latest, may_enter, room_for_prompts, share_tokens

COUNTS = st.lists(st.integers(1, 40), max_size=12)
BUDGETS = st.builds(TokenBudget, prefill=st.integers(1, 64), mixed=st.integers(1, 64))


@given(uncomputed=COUNTS, budget=BUDGETS)
def test_who_decodes_always_gets_its_token(uncomputed: list[int], budget: TokenBudget) -> None:
    shares = share_tokens(uncomputed, budget)
    assert all(share == 1 for share, count in zip(shares, uncomputed, strict=True) if count == 1)


@given(uncomputed=COUNTS, budget=BUDGETS)
def test_a_step_stays_within_its_budget(uncomputed: list[int], budget: TokenBudget) -> None:
    shares = share_tokens(uncomputed, budget)
    decoding = uncomputed.count(1)
    limit = max(budget.mixed, decoding + 1) if decoding else budget.prefill
    total = sum(shares) + room_for_prompts(uncomputed, shares, budget)
    assert total <= limit or sum(shares) == len(shares)
    assert sum(shares) <= limit


@given(uncomputed=COUNTS, budget=BUDGETS)
def test_prompts_are_served_in_order_and_the_first_always_advances(
    uncomputed: list[int], budget: TokenBudget
) -> None:
    shares = share_tokens(uncomputed, budget)
    prompts = [(share, count) for share, count in zip(shares, uncomputed, strict=True) if count > 1]
    if prompts:
        assert prompts[0][0] >= 1
    behind = False
    for share, count in prompts:
        assert not (behind and share)
        behind = behind or share < count


def test_prompts_get_what_decoding_leaves() -> None:
    budget = TokenBudget(prefill=100, mixed=10)
    assert share_tokens([1, 30, 1, 5], budget) == [1, 8, 1, 0]
    assert share_tokens([30, 5], budget) == [30, 5]
    assert share_tokens([90, 30], budget) == [90, 10]
    assert share_tokens([1] * 12 + [9], budget) == [1] * 12 + [1]
    assert room_for_prompts([1, 1], [1, 1], budget) == 8
    assert room_for_prompts([1, 30], [1, 9], budget) == 0
    assert room_for_prompts([], [], budget) == 100


def test_a_newcomer_leaves_everybody_in_the_batch_a_block() -> None:
    assert may_enter(5, [], free_blocks=5)
    assert not may_enter(6, [], free_blocks=5)
    assert may_enter(3, [0, 0], free_blocks=5)
    assert not may_enter(4, [0, 0], free_blocks=5)
    assert not may_enter(3, [0, 1], free_blocks=5)


def test_the_latest_arrival_is_preempted() -> None:
    assert latest([(3, 0), (5, 1), (5, 0), (4, 7)]) == 1
