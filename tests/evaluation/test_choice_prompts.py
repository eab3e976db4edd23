"""Multiple choice: prompts, and the likelihood of letters."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.choice_prompts import (
    AFTER_STORY,
    BEFORE_STORY,
    LETTERS,
    OMITTED,
    Question,
    build_choice_prompt,
    score_letters,
)
from tests.helpers.retrieval import (
    STORY,
    TOKENIZERS,
    bigram_model,
    merges_bracket_and_a,
    new_model,
    tokenizers,  # noqa: F401
)

QUESTION = Question(STORY * 3, "What sang?", ("The cat", "The rain", "The sea", "Nobody"), 2)


def test_letters_are_scored_as_the_tokenizer_writes_them() -> None:
    tokenizer = merges_bracket_and_a()
    prompt = build_choice_prompt(tokenizer, QUESTION)
    bracket, merged = tokenizer.convert_tokens_to_ids(["(", "(A"])
    assert prompt.letters == ((merged,), *((bracket, tokenizer.convert_tokens_to_ids(one)) for one in "BCD"))
    assert tokenizer.decode(prompt.context).endswith("Answer: ")
    # A lone "A" looks best after "(", but the text "(A" is never written so: "(A" is unlikely here and C wins.
    model = bigram_model(tokenizer, {"Ġ": {"(": 8.0, "(A": 2.0}, "(": {"A": 9.0, "B": 5.0, "C": 6.0, "D": 4.0}})
    scores = score_letters(model, prompt)
    rest = len(tokenizer)
    first = math.log(math.exp(8) + math.exp(2) + rest - 2)
    second = math.log(sum(map(math.exp, (9, 5, 6, 4))) + rest - 4)
    expected = [2 - first, *(8 - first + logit - second for logit in (5, 6, 4))]
    assert scores == pytest.approx(expected, abs=1e-4)  # float32 logits below 10
    assert scores.index(max(scores)) == 2


@pytest.mark.parametrize("name", [*TOKENIZERS, "bracket"])
def test_scores_are_those_of_whole_logits(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    tokenizer = merges_bracket_and_a() if name == "bracket" else tokenizers[name]
    model = new_model(len(tokenizer), seed=1)
    prompt = build_choice_prompt(tokenizer, QUESTION)
    text = BEFORE_STORY + QUESTION.article + AFTER_STORY.format(question=QUESTION.question, options=QUESTION.options)
    expected = []
    for letter, ids in zip(LETTERS, prompt.letters, strict=True):
        assert [*prompt.context, *ids] == [0, *encode(tokenizer, text + letter)]
        row = torch.tensor([[*prompt.context, *ids]])
        with torch.inference_mode():
            logits = model(row).logits[0, :-1].log_softmax(dim=-1)
        expected.append(float(logits.gather(1, row[0, 1:, None])[len(prompt.context) - 1 :].sum()))
    assert score_letters(model, prompt) == pytest.approx(expected, abs=1e-4)  # nats below 100, float32


@pytest.mark.parametrize("name", [*TOKENIZERS, "bracket"])
def test_long_story_loses_its_end(tokenizers: dict[str, PreTrainedTokenizerFast], name: str) -> None:
    tokenizer = merges_bracket_and_a() if name == "bracket" else tokenizers[name]
    whole = build_choice_prompt(tokenizer, QUESTION)
    assert not whole.cut and build_choice_prompt(tokenizer, QUESTION, whole.length) == whole
    story = Question(STORY * 30, QUESTION.question, QUESTION.options, QUESTION.answer)
    cut = build_choice_prompt(tokenizer, story, whole.length + 50)
    assert cut.cut and cut.length == whole.length + 50
    before, after = BEFORE_STORY + story.article, AFTER_STORY.format(question=story.question, options=story.options)
    kept = next(n for n in range(len(cut.context), 0, -1) if cut.context[:n] == [0, *encode(tokenizer, before)][:n])
    assert cut.context[kept:] == encode(tokenizer, OMITTED + after + "A")[: len(cut.context) - kept]
    assert kept > len(encode(tokenizer, BEFORE_STORY))
    with pytest.raises(ConfigError, match="max-tokens 30 is too short"):
        build_choice_prompt(tokenizer, story, 30)
