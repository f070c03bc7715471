"""What classes of heads say of themselves, and which heads a task may have by it."""

import inspect

import pytest

from jaxseg.heads import HEADS, heads_that, solved_of, takes_several_maps
from jaxseg.heads.guided import GuidedDecoder
from jaxseg.tasks import TASKS


def test_every_head_is_asked_or_not():
    asked, others = (heads_that(ask=ask, coarse=True) for ask in (True, False))
    assert sorted(asked + others) == sorted(HEADS) and asked and others
    assert "attention" in asked and "linear" in others
    for name, head in HEADS.items():
        takes = "query_B" in inspect.signature(head.__call__).parameters
        assert takes == (name in asked)


@pytest.mark.parametrize("ask", [True, False])
def test_a_coarse_output_is_left_out_where_it_is_no_use(ask):
    every, fine = (heads_that(ask=ask, coarse=coarse) for coarse in (True, False))
    assert fine == tuple(n for n in every if not getattr(HEADS[n], "coarse", False))
    # The probe of the token grid is coarse; those made from it are not.
    assert not {"linear"} & set(fine) and (ask or {"bilinear", "linear_norm"} <= set(fine))


def test_tasks_have_heads_that_serve_them():
    assert "linear" in TASKS["binary"].heads and "linear" not in TASKS["multiclass"].heads
    assert set(TASKS["multiclass"].heads) < set(TASKS["binary"].heads)
    assert not set(TASKS["query"].heads) & set(TASKS["binary"].heads)
    assert {name for task in TASKS.values() for name in task.heads} == set(HEADS)


def test_what_a_head_says_of_itself():
    assert takes_several_maps(HEADS["deeplabv3plus"]()) and takes_several_maps(HEADS["attention"]())
    assert not takes_several_maps(HEADS["guided"]())
    assert solved_of(HEADS["linear"]()) is None and solved_of(GuidedDecoder()) is None
    solved = solved_of(GuidedDecoder(prior=0.1))
    assert (solved.path, solved.penalty) == ("prior", 0.1)
