"""Admission: a pure function of demands and of what is free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenstep.engine.scheduler import Demand, plan_admission

DEMANDS = st.lists(
    st.builds(
        Demand,
        prompt_blocks=st.integers(0, 6),
        choice_blocks=st.integers(1, 5),
        choices=st.integers(0, 6),
        spare_blocks=st.integers(0, 1),
    ),
    max_size=6,
)


def blocks_taken(demand: Demand, granted: int) -> int:
    spare = demand.spare_blocks if granted == demand.choices else 0
    return demand.prompt_blocks + granted * demand.choice_blocks - spare


@given(demands=DEMANDS, rows=st.integers(0, 10), blocks=st.integers(0, 30))
def test_no_more_is_granted_than_is_free(demands: list[Demand], rows: int, blocks: int) -> None:
    grants = plan_admission(demands, rows, blocks)
    assert sum(grants) <= rows
    taken = sum(
        blocks_taken(demand, count) for demand, count in zip(demands, grants, strict=False) if demand.choices
    )
    assert taken <= blocks


@given(demands=DEMANDS, rows=st.integers(0, 10), blocks=st.integers(0, 30))
def test_only_the_last_that_gets_in_may_lack_choices(demands: list[Demand], rows: int, blocks: int) -> None:
    grants = plan_admission(demands, rows, blocks)
    for demand, count in zip(demands, grants[:-1], strict=False):
        assert count == demand.choices
    for demand, count in zip(demands, grants, strict=False):
        assert count or not demand.choices


@given(demand=DEMANDS.filter(bool).map(lambda demands: demands[0]), rows=st.integers(1, 10))
def test_whoever_is_alone_gets_in_if_one_choice_fits(demand: Demand, rows: int) -> None:
    one = demand.prompt_blocks + (demand.choice_blocks if demand.choices else 0)
    assert len(plan_admission([demand], rows, one)) == 1


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    large, small = Demand(9, 1, 1), Demand(1, 1, 1)
    assert plan_admission([large, small], free_rows=4, free_blocks=5) == []


def test_choices_that_do_not_fit_wait_and_keep_others_waiting() -> None:
    many, one = Demand(1, 2, 8), Demand(1, 1, 1)
    assert plan_admission([many, one], free_rows=16, free_blocks=8) == [3]


def test_the_last_choice_inherits_the_unfilled_block() -> None:
    assert plan_admission([Demand(2, 2, 1, spare_blocks=1)], free_rows=1, free_blocks=3) == [1]
    assert plan_admission([Demand(2, 2, 1, spare_blocks=0)], free_rows=1, free_blocks=3) == []


def test_a_prompt_without_choices_needs_no_row() -> None:
    assert plan_admission([Demand(2, 0, 0)], free_rows=0, free_blocks=2) == [0]
