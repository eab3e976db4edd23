"""Prompts as a user's message in the chat template of a model's tokenizer, with exact numbers of tokens."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError, first_line

_MESSAGE = "0message0"  # stands for the message, of which templates cut nothing off


@dataclass(frozen=True)
class ChatTurn:
    """The text of a template around a user's only message, up to where the answer begins.

    Special tokens are in it as text, that of the beginning included where the template has it, so that no other is put
    before.
    """

    before: str
    after: str


def chat_text(tokenizer: Any, message: str) -> str:
    """One message of a user as a tokenizer's template renders it, up to where the answer begins.

    Raises:
        ConfigError: there is no template, or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _without(str(tokenizer.name_or_path))
    messages = [{"role": "user", "content": message}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        raise ConfigError(f"chat_template of {tokenizer.name_or_path!r} fails: {first_line(error)}") from error
    return text


def chat_turn(tokenizer: Any) -> ChatTurn:
    """The text that a tokenizer's template puts around any message.

    Raises:
        ConfigError: as `chat_text`; a template that changes the message.
    """
    text = chat_text(tokenizer, _MESSAGE)
    before, found, after = text.partition(_MESSAGE)
    if not found or _MESSAGE in after:
        raise ConfigError(f"chat_template of {tokenizer.name_or_path!r} does not keep a message as it is, once")
    return ChatTurn(before, after)


def chat_template_hash(model: str) -> str:
    """A short hash of the chat template of a model's tokenizer, which rows record.

    Raises:
        ConfigError: it has none.
    """
    template = load_tokenizer(model).chat_template
    if not template:
        raise _without(model)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:16]


def _without(model: str) -> ConfigError:
    return ConfigError(f"chat_template: the tokenizer of {model!r} has no chat template")


def chat_note(model: str) -> str | None:
    """A remark on a model that has a chat template, for an evaluation without it; None where it has none."""
    try:
        if not getattr(load_tokenizer(model), "chat_template", None):
            return None
    except ConfigError:  # which the evaluation of this model reports, and others go on
        return None
    return f"{model} has a chat template and is asked without it; --chat-template puts prompts into it"


def print_chat_notes(models: Iterable[str], chat_template: bool) -> None:
    """Print the notes on models that are asked without their template, each once."""
    for note in () if chat_template else filter(None, map(chat_note, dict.fromkeys(models))):
        print(f"note: {note}", file=sys.stderr)
