"""Which tokenizer a tokenized set was made with, and whether a model's reads text in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from scaled_rope.errors import ConfigError


def _hash(vocabulary: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()[:16]


def vocabulary_hash(tokenizer: Any) -> str:
    """Short hash of all tokens and their ids, so that another tokenizer under the same path is noticed."""
    return _hash(tokenizer.get_vocab())


def base_vocabulary_hash(tokenizer: Any) -> str:
    """The same without tokens that were added to the vocabulary, such as one for padding or the roles of a chat."""
    added = tokenizer.get_added_vocab()
    return _hash({token: index for token, index in tokenizer.get_vocab().items() if token not in added})


def check_tokenizer(rows: Any, name: str, tokenizer: Any, model: str) -> str | None:
    """Hold a tokenized set against a model's tokenizer.

    Args:
        rows: a result of `open_rows`; without a record of a tokenizer, as in tables of `datasets`, all is well.
        name: of the set, in messages.
        tokenizer: the model's.
        model: its name in messages.

    Returns:
        A note where the vocabularies differ but nothing shows that texts are read otherwise; else None.

    Raises:
        ConfigError: the set's ids stand for other tokens than the model's.
    """
    meta = getattr(rows, "meta", {})
    made = meta.get("tokenizer_hash")
    if made is None or made == vocabulary_hash(tokenizer):
        return None
    by = f"dataset {name} was made with tokenizer {meta.get('tokenizer')}"
    base = meta.get("base_vocabulary_hash")
    if base is None:  # a set of an earlier version
        return f"{by}, whose vocabulary is not that of {model}; the set does not say in what they differ"
    if base == base_vocabulary_hash(tokenizer):
        return f"{by}, which has other added tokens than that of {model}"
    raise ConfigError(
        f"{by}, whose ids stand for other tokens than those of {model}; make it with the tokenizer of {model}"
    )
