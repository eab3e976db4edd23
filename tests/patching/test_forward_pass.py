"""The pass that runs: nested, ended by the hooks that began it, with lengths said from outside."""

from __future__ import annotations

import torch

from scaled_rope.patching import forward_pass
from scaled_rope.patching.forward_pass import ForwardPass, current_pass, lengths, row_lengths

POSITIONS = torch.tensor([[0, 1, 2], [4, 5, 6]])


def test_rows_are_as_long_as_their_positions_or_as_is_said() -> None:
    assert row_lengths(POSITIONS).tolist() == [3, 7]
    with lengths(torch.tensor([9])):
        assert row_lengths(POSITIONS).tolist() == [9]
        with lengths(None):
            assert row_lengths(POSITIONS).tolist() == [3, 7]
        assert row_lengths(POSITIONS).tolist() == [9]
    assert current_pass() is None


def test_a_pass_has_the_lengths_said_around_it() -> None:
    hooks = object()
    with lengths(torch.tensor([9])):
        forward_pass.begin(ForwardPass(hooks=hooks))
        assert row_lengths(POSITIONS).tolist() == [9]
        assert forward_pass.end(hooks) is not None
    assert current_pass() is None


def test_a_pass_inside_another_leaves_it_as_it_was() -> None:
    outer, inner = ForwardPass(hooks=object()), ForwardPass(hooks=object())
    forward_pass.begin(outer)
    forward_pass.begin(inner)
    assert current_pass() is inner
    assert forward_pass.end(outer.hooks) is None  # not the one that runs
    assert forward_pass.end(inner.hooks) is inner and current_pass() is outer
    assert forward_pass.end(outer.hooks) is outer and current_pass() is None


def test_a_pass_that_an_interrupt_left_behind_is_dropped_by_the_next_of_its_hooks() -> None:
    hooks = object()
    forward_pass.begin(ForwardPass(hooks=hooks))  # and never ended
    again = ForwardPass(hooks=hooks)
    forward_pass.begin(again)
    assert again.outer is None
    assert forward_pass.end(hooks) is again and current_pass() is None
