"""Long texts to token ids, in windows and over processes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from scaled_rope.evaluation.passkey_prompts import OPENING
from scaled_rope.texts import tokenizing


def test_texts_are_read_as_they_are_needed(tokenizer_dir, monkeypatch):
    """Memory does not grow with the corpus: no more than a batch of texts is ahead of the tokens that were taken."""
    monkeypatch.setattr(tokenizing, "BATCH", 300)
    read, size = 0, len("There is text number 0.")

    def texts():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "There is text number 0."

    taken = 0
    for _ in tokenizing.tokenized(texts(), tokenizing.Tokenizers(str(tokenizer_dir), 1)):
        taken += 1
        assert read - taken <= 300 // size + 1
    assert taken == read == 1000


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as Llama 2 has it: spaces become U+2581, one more opens the text, and nothing cuts it into words."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>", *octets], max_token_length=8)
    runs = [character * 64 for character in "-a "]  # tokens of four: where one begins depends on where the run does
    tokenizer.train_from_iterator([*OPENING.split(". "), *runs], trainer)
    folder = tmp_path_factory.mktemp("sentencepiece")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def awkward_text(seed: int, pieces: int) -> str:
    """Words, numbers, blank lines, letters of two to four bytes, and runs that no window sees as a whole."""
    rng = random.Random(seed)
    made = ["There", " is", " an", " important", " 1234567", ".\n\n", "\t", "  ", ", ", "don't"]
    made += [" \u00e9t\u00e9", "\u65e5\u672c\u8a9e", "\U0001f600"]
    text = [rng.choice(made) for _ in range(pieces)]
    for place, run in ((pieces // 4, " " * 1500), (pieces // 2, "a" * 2500), (pieces * 3 // 4, "-" * 5000)):
        text.insert(place, run)
    return "".join(text)


@pytest.mark.parametrize("kind", ["tokenizer_dir", "sentencepiece_dir"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_long_document_has_the_ids_of_the_whole(kind, processes, request, monkeypatch):
    from scaled_rope.checkpoint import load_tokenizer

    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(tokenizing, "WINDOW", 1025)
    monkeypatch.setattr(tokenizing, "OVERLAP", 256)
    monkeypatch.setattr(tokenizing, "AGREEMENT", 16)
    monkeypatch.setattr(tokenizing, "BATCH", 4000)
    texts = [
        "There is. " * 200 + "-" * 5003 + "a" * 2001 + " There",
        awkward_text(0, 6000),
        "short",
        "",
        awkward_text(1, 300),
        "x" * 1280,
        "b " * 641,
    ]
    assert sum(1 for _ in tokenizing.parts_of(texts[1])) > 20
    whole = load_tokenizer(str(folder))
    with tokenizing.Tokenizers(str(folder), processes) as tokenizers:
        for text, ids in zip(texts, tokenizing.tokenized(iter(texts), tokenizers), strict=True):
            np.testing.assert_array_equal(ids, whole(text, add_special_tokens=False)["input_ids"])


def test_windows_that_disagree_are_read_again_as_one(sentencepiece_dir, monkeypatch):
    monkeypatch.setattr(
        tokenizing, "WINDOW", 1025
    )  # by 769 from one to the next: a run of fours is cut otherwise in each
    monkeypatch.setattr(tokenizing, "OVERLAP", 256)
    encode, sizes = tokenizing._encode, []
    monkeypatch.setattr(tokenizing, "_encode", lambda parts: sizes.extend(len(p.text) for p in parts) or encode(parts))
    tokenizers = tokenizing.Tokenizers(str(sentencepiece_dir), 1)
    list(tokenizing.tokenized(["There is. " * 300 + "-" * 20_000 + "There is. " * 300], tokenizers))
    again = [size for size in sizes if size > tokenizing.WINDOW + tokenizing.OVERLAP]
    # Each doubles, so that an endless run costs a few times its length and not its square.
    assert again and sum(again) < 4 * 26_000


@pytest.mark.parametrize("kind", ["tokenizer_dir", "sentencepiece_dir"])
@pytest.mark.parametrize("processes", [1, 2])
def test_special_tokens_that_a_text_spells_are_plain_text_unless_asked_for(kind, processes, request):
    from scaled_rope.checkpoint import load_tokenizer

    folder, text = request.getfixturevalue(kind), "There <s> is</s> an </s>"
    tokenizer = load_tokenizer(str(folder))
    found = {}
    for read_special in (False, True):
        with tokenizing.Tokenizers(str(folder), processes, read_special) as tokenizers:
            found[read_special] = next(iter(tokenizing.tokenized([text], tokenizers))).tolist()
    assert found[True] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [found[True].count(token) for token in (0, 1)] == [1, 2]
    assert not {0, 1} & set(found[False])
    if kind == "tokenizer_dir":  # the other one has no decoder
        assert tokenizer.decode(found[False]) == text
