"""Inputs that begin alike are read in order, with the same scores, where that saves time and the model allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scaled_rope.evaluation import continuations, shared_beginnings
from scaled_rope.evaluation.continuations import Continuation, score
from scaled_rope.evaluation.shared_beginnings import can_share, chains_of, common, is_worth, saved_tokens
from scaled_rope.patching import loss
from scaled_rope.patching.loading import apply_scaling
from tests.helpers.lm_eval_runs import one_by_one, scaling_of
from tests.helpers.models import Make


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def questions(count: int = 3, endings: int = 4, examples: int = 60, own: int = 40) -> list[Continuation]:
    """Questions after the same examples, each with several endings of several lengths, out of order."""
    shared = tokens(examples, 1)
    found = []
    for ending in range(endings):
        for question in range(count):
            context = [*shared, *tokens(own, 10 + question)]
            found.append(Continuation(context, tokens(3 + 2 * ending, 100 * question + ending)))
    return found


def test_chains() -> None:
    one, two, three, other = [1] * 40, [1] * 40 + [2, 3], [1] * 40 + [2, 4], [5] * 40
    inputs = [tuple(ids) for ids in (three, other, one, two)]
    assert chains_of(inputs) == [[tuple(one), tuple(two), tuple(three)]]
    assert saved_tokens(chains_of(inputs)[0]) == 40 + 41
    assert common(one, two) == common(two, one) == 40 and common(two, three) == 41 and common(one, other) == 0
    assert chains_of([tuple([1] * 31), tuple([1] * 31 + [2])]) == []  # too little in common
    # Two groups that are neighbours in the alphabet stay two.
    assert len(chains_of([(7, *one), (7, *two), (8, *one), (8, *two)])) == 2


@pytest.mark.parametrize("spec", ["default", "yarn:4", "cope,clip=2", "ntk-mixed:4"])
def test_the_same_scores(tiny_model: Make, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scaling, requests = tiny_model(), scaling_of(spec), questions()
    apply_scaling(model, scaling)
    shared: list[int] = []
    inner = continuations.shared_hidden_states
    monkeypatch.setattr(
        continuations, "shared_hidden_states", lambda *given: shared.append(len(given[1])) or inner(*given)
    )
    found = score(model, scaling, [*requests, Continuation(tokens(9, 3), [4])])
    assert shared == [len(requests)]  # one chain of all questions, since all follow the same examples
    expected = [one_by_one(model, request) for request in [*requests, Continuation(tokens(9, 3), [4])]]
    # Float32 sums in another order; the values are around -40.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=5e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_several_continuations_of_one_input(tiny_model: Make) -> None:
    """Continuations of one token are answered by one input, and longer ones that end alike too."""
    model, scaling = tiny_model(), scaling_of("yarn:4")
    apply_scaling(model, scaling)
    context = tokens(120, 1)
    requests = [Continuation(context, [letter]) for letter in (3, 4, 5)]
    requests += [Continuation(context[:-2], [*context[-2:], 3]), Continuation([*context, 9], tokens(3, 7))]
    expected = [one_by_one(model, request)[0] for request in requests]
    assert [value for value, _ in score(model, scaling, requests)] == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-ntk:2", "rerope,window=16"])
def test_not_where_the_beginning_would_be_another(tiny_model: Make, spec: str) -> None:
    model, scaling, requests = tiny_model(), scaling_of(spec), questions()
    apply_scaling(model, scaling)
    chain = chains_of([tuple([*one.context, *one.continuation][:-1]) for one in requests])[0]
    assert is_worth(chain, model) and not can_share(model, scaling, chain)
    expected = [one_by_one(model, request)[0] for request in requests]
    assert [value for value, _ in score(model, scaling, requests)] == pytest.approx(expected, abs=5e-4)


def test_a_cache_that_is_misread_is_noticed(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scaling, requests = tiny_model(), scaling_of("yarn:4"), questions()
    apply_scaling(model, scaling)
    chain = chains_of([tuple([*one.context, *one.continuation][:-1]) for one in requests])[0]
    assert can_share(model, scaling, chain)
    inner = loss.DynamicCache

    class Stale(inner):  # type: ignore[misc, valid-type]
        """Keeps what it should forget, as a cache does that cannot go back."""

        def crop(self, max_length: int) -> None:
            pass

    monkeypatch.setattr(loss, "DynamicCache", Stale)
    assert not can_share(model, scaling, chain)
    expected = [one_by_one(model, request)[0] for request in requests]
    assert [value for value, _ in score(model, scaling, requests)] == pytest.approx(expected, abs=5e-4)


def test_worth_it(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    few = [tuple(tokens(40, 1) + [letter]) for letter in range(3)]
    assert saved_tokens(few) == 80 and not is_worth(few, model)  # three passes cost more than 80 tokens
    many = [tuple(tokens(400, 1) + [letter]) for letter in range(3)]
    assert is_worth(many, model)
    on_a_gpu = tiny_model().to("meta")  # whose few weights take no time there, unlike a pass
    assert not is_worth(many, on_a_gpu)
    monkeypatch.setattr(shared_beginnings, "_GPU_FLOPS", 1e6)
    assert is_worth(many, on_a_gpu)


def test_less_is_read(tiny_model: Make) -> None:
    model, scaling, requests = tiny_model(), scaling_of("yarn:4"), questions(count=3, endings=4, examples=60, own=40)
    apply_scaling(model, scaling)
    whole = sum(len(one.context) + len(one.continuation) - 1 for one in requests)
    read: list[int] = []

    def count(module: Any, args: Any, given: dict[str, Any]) -> None:
        read.append(int(given["input_ids"].numel()))

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    score(model, scaling, requests)
    # The examples once, each question once, and the endings, beside the trial of the cache with two inputs.
    endings = sum(len(one.continuation) - 1 for one in requests)
    trial = 2 * 110
    again = len(requests)  # a token that predicts what is wanted is read anew, even if it is shared
    assert sum(read) <= 60 + 3 * 40 + endings + again + trial < whole / 2
