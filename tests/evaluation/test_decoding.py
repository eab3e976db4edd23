"""Greedy decoding of numbers against generate()."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from scaled_rope import patch_model
from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.decoding import decode_numbers, judge, number_tokens
from tests.helpers.cases import in_turn
from tests.helpers.retrieval import (
    TOKENIZERS,
    TRAINED,
    generated,
    new_model,
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
    wrap,
)


@pytest.mark.parametrize(
    ("text", "ended", "right"),
    [
        ("", False, None),
        ("", True, False),
        (" \n", False, None),
        ("12345", False, None),  # a digit might follow
        ("12345", True, True),
        (" 12345 ", False, True),
        ("12345.", False, True),
        ("123456", False, False),
        (" 123456", True, False),
        ("1234 ", False, False),
        ("1234", False, None),
        ("1234", True, False),
        ("13", False, False),
        ("12,345", False, False),
        ("the 12345th", False, True),
        ("12346 12345", False, False),  # the first integer counts
        ("012345 ", False, True),  # as an integer
        ("0", False, None),
    ],
)
def test_judge(text: str, ended: bool, right: bool | None) -> None:
    assert judge(text, ended, 12345) is right


@pytest.mark.parametrize("name", TOKENIZERS)
def test_number_tokens_are_digits_blanks_and_the_end(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    tokenizer = tokenizers[name]
    allowed = number_tokens(tokenizer, len(tokenizer) + 7, [1])
    assert allowed.shape == (len(tokenizer) + 7,) and not allowed[len(tokenizer) :].any()
    for token, index in tokenizer.get_vocab().items():
        plain = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").replace("ĉ", "\t").replace("č", "\r")
        assert bool(allowed[index]) == (index == 1 or set(plain) <= set("0123456789 \n\t\r")), token
    for digit in "0123456789":
        assert allowed[encode(tokenizer, digit)].all()
    if name == "merged":
        assert any(len(token.strip("Ġ")) > 1 and allowed[i] for token, i in tokenizer.get_vocab().items() if i > 1)


WAYS = [("default", False), ("yarn:4", False), ("dynamic-yarn", False), ("dynamic-yarn", True)]


@pytest.mark.parametrize(("name", "way"), in_turn(list(TOKENIZERS), WAYS, each=2))
@pytest.mark.parametrize("restricted", [True, False])
def test_decoding_agrees_with_generate(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, way: tuple[str, bool], restricted: bool
) -> None:
    (spec, cached), tokenizer, steps = way, tokenizers[name], 6
    model = new_model(len(tokenizer), seed=3)
    scaling = patch_model(model, spec).scaling
    numeric = number_tokens(tokenizer, len(tokenizer), [1])
    allowed = numeric if restricted else None
    with torch.no_grad():  # unrestricted answers have digits in them too
        model.lm_head.weight[numeric] *= 2.5
    rng = torch.Generator().manual_seed(5)
    tasks: list[tuple[list[int], list[int], int]] = []
    expected: list[tuple[list[int], bool]] = []
    for length in (TRAINED - 20, 2 * TRAINED, 2 * TRAINED, 2 * TRAINED):
        for _ in range(4):
            ids = torch.randint(2, len(tokenizer), (length,), generator=rng).tolist()
            made = generated(model, ids, allowed, steps, cached=cached or not scaling.is_length_dependent)
            text = tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found = re.search("[0-9]+", text)
            number = int(found[0]) if found else 12345
            # The number itself, a longer, a shorter, and another one; in the tokens in which it would be written.
            for wanted in (number, number * 10 + 7, number // 10, number + 1):
                tasks.append((ids, encode(tokenizer, f" {wanted}"), wanted))
                expected.append((made, found is not None and wanted == number))
    options = {"length_dependent": scaling.is_length_dependent, "max_new_tokens": steps, "allowed": allowed}
    options["cached"] = cached
    answers = dict(decode_numbers(model, tokenizer, tasks, rows_per_pass=5, **options))
    assert sorted(answers) == list(range(len(tasks)))
    for index, (made, right) in enumerate(expected):
        assert answers[index].right is right, (tasks[index][2], answers[index])
        assert answers[index].ids == made[: len(answers[index].ids)]
    rights = sum(right for _, right in expected)
    assert 8 <= rights <= len(expected) // 2  # the case was put
    alone = dict(decode_numbers(model, tokenizer, tasks[:5], rows_per_pass=1, **options))
    assert alone == {index: answers[index] for index in range(5)}


def test_a_right_answer_takes_one_pass_and_no_cache(
    tokenizers: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers["merged"]
    model = new_model(len(tokenizer), seed=3)
    allowed = number_tokens(tokenizer, len(tokenizer), [])
    calls: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)) or None, with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)) or None)
    ids = torch.randint(2, len(tokenizer), (40,), generator=torch.Generator().manual_seed(1)).tolist()
    made = generated(model, ids, allowed, 4, cached=True)
    text = tokenizer.decode(made)
    number = int(re.search("[0-9]+", text)[0])  # type: ignore[index]
    calls.clear()
    options: dict[str, Any] = {"rows_per_pass": 1, "max_new_tokens": 4, "allowed": allowed}
    ((_, answer),) = decode_numbers(model, tokenizer, [(ids, made, number)], length_dependent=False, **options)
    assert answer.right and answer.ids == made[: len(answer.ids)] and text.startswith(answer.text)
    # One pass over the prompt and four drafted tokens; only the five positions behind the prompt are projected.
    assert calls == [(1, 44), (1, 5, len(tokenizer))]


def test_a_tokenizer_without_digits_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, " ": 3}, unk_token="a"))
    with pytest.raises(ConfigError, match="restrict-tokens false"):
        number_tokens(wrap(inner), 4, [1])
