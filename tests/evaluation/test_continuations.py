"""Scores of continuations, in batches and one by one."""

from __future__ import annotations

import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import NO_LIMIT, Continuation, context_limit, score
from scaled_rope.patching.loading import apply_scaling
from tests.helpers.lm_eval_runs import TRAINED, one_by_one, scaling_of
from tests.helpers.models import Make

# "cope" and "ntk-mixed" are unknown to transformers; the others cover every way in which a scale can follow the length.
SPECS = ("default", "yarn:4", "cope,clip=2", "ntk-mixed:4", "dynamic-yarn", "dynamic-ntk:2", "dynamic-linear")


def random_requests(count: int = 14, longest: int = 3 * TRAINED) -> list[Continuation]:
    """Requests of many lengths around the trained one; the last two share an input and differ in one token."""
    generator = torch.Generator().manual_seed(5)
    requests = []
    for index in range(count):
        length = 2 + index * (longest - 2) // (count - 1)
        ids = torch.randint(1, 61, (length + 4,), generator=generator).tolist()
        requests.append(Continuation(ids[:length], ids[length : length + 1 + index % 4]))
    first = requests[-1]
    return [*requests, Continuation(first.context, [*first.continuation[:-1], 1 + first.continuation[-1] % 60])]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("rows", [None, 4])
def test_scores_in_batches_equal_one_by_one(tiny_model: Make, spec: str, rows: int | None) -> None:
    model, scaling, requests = tiny_model(), scaling_of(spec), random_requests()
    apply_scaling(model, scaling)
    expected = [one_by_one(model, request) for request in requests]
    found = score(model, scaling, requests, rows=rows)
    # Float32 sums in another order; the values are around -10.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_padding_together_would_change_dynamic_scores(tiny_model: Make) -> None:
    """The batches guard against this: a short row beside one beyond the trained length, read at the latter's scale."""
    model, requests = tiny_model(), random_requests()
    apply_scaling(model, scaling_of("dynamic-yarn"))
    short = requests[3]
    wrong = score(model, scaling_of("yarn:4"), [short, requests[-1]])[0][0]  # static: they may share a pass
    assert abs(wrong - one_by_one(model, short)[0]) > 1e-2


def test_a_greedy_continuation_is_recognised(tiny_model: Make) -> None:
    model, scaling = tiny_model(), scaling_of("yarn:4")
    apply_scaling(model, scaling)
    context = random_requests()[5].context
    greedy = list(context)
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]), use_cache=False).logits[0, -1].argmax()))
    right = Continuation(context, greedy[len(context) :])
    wrong = Continuation(context, [*right.continuation[:-1], 1 + right.continuation[-1] % 60])
    assert [answer for _, answer in score(model, scaling, [right, wrong])] == [True, False]


def test_long_inputs_lose_their_beginning(tiny_model: Make) -> None:
    model, scaling = tiny_model(), scaling_of("default")
    request = random_requests()[-1]
    kept = Continuation(request.context[len(request.context) + len(request.continuation) - 21 :], request.continuation)
    ((found, _),), ((expected, _),) = score(model, scaling, [request], max_length=20), score(model, scaling, [kept])
    assert found == pytest.approx(expected, abs=1e-5) != score(model, scaling, [request])[0][0]
    for continuation, length in (([], 20), ([1] * 21, 20)):
        with pytest.raises(ConfigError, match="continuation"):
            score(model, scaling, [Continuation([1], continuation)], max_length=length)


def test_context_limit(tiny_model: Make) -> None:
    config = tiny_model().config
    assert context_limit(config, scaling_of("default")) == TRAINED
    assert context_limit(config, scaling_of("yarn:4")) == 4 * TRAINED
    assert context_limit(config, scaling_of("dynamic-yarn")) == NO_LIMIT
