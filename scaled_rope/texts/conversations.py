"""Conversations, and prompts with completions, as documents of tokens of which only the answers are targets.

A conversation becomes tokens by the tokenizer's own chat template. Which of them are the assistant's is what the
template's `{% generation %}` blocks say; for a template without them it is found by rendering the conversation up to
each answer, with and without it. Where that leaves a doubt, the record is refused.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scaled_rope.errors import ConfigError, first_line
from scaled_rope.texts.documents import (
    JSON_SUFFIXES,
    check_there,
    chosen_files,
    expanded,
    has_half_a_pair,
    is_local,
    read_json,
    suffix_of,
)
from scaled_rope.texts.hub import hub_records
from scaled_rope.texts.packing import Document
from scaled_rope.texts.tokenizing import Ids, Tokenizers, own_tokenizer, reads_special

ROLES = ("system", "developer", "user", "assistant", "tool")
#: `from` of ShareGPT -> role
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
#: keys of a message by which other programs leave it out; here it is `weight`
_SWITCHES = ("train", "training")
#: keys of a message that are read here, besides those that the chat template reads
_READ = {"role", "content", "from", "value", "weight", *_SWITCHES}
BATCH = 64  # records handed to a process at once

Weights = npt.NDArray[np.uint8]
Message = dict[str, Any]


@dataclass(frozen=True)
class ChatFields:
    """The fields of a record that hold a conversation, or a prompt and its completion.

    Attributes:
        messages: a list of messages, each with `role` and `content`, or with `from` and `value` as in ShareGPT.
        prompt, completion: two texts, which are not put into a template; or two lists of messages.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            missing = "completion" if self.completion is None else "prompt"
            raise ConfigError(f"{missing} is missing: prompt and completion belong together")
        if (self.messages is None) == (self.prompt is None):
            raise ConfigError("name either messages, or prompt and completion")


@dataclass
class Refusals:
    """Records that cannot be used: each is an error, or with `skip` it is counted and left out."""

    skip: bool = False
    count: int = 0
    first: str = field(default="", init=False)
    told: set[str] = field(default_factory=set, init=False)
    """Fields, and keys of messages, of which it has been said that they are not used."""

    def add(self, where: str, reason: str) -> None:
        """Take note of a record.

        Raises:
            ConfigError: records are not to be left out.
        """
        if not self.skip:
            raise ConfigError(f"dataset {where}: {reason}")
        self.first = self.first or f"{where}: {reason}"
        self.count += 1


class _Refused(Exception):
    """A record that cannot be used; the message is the reason."""


# ------------------------------------------------------------------------------------------------------- templates


def template_of(tokenizer: Any, name: str) -> str:
    """A tokenizer's chat template.

    name: of the tokenizer, for errors.

    Raises:
        ConfigError: it has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:  # none, or several of which none is the default
        raise ConfigError(
            f"tokenizer {name} has no chat template, which messages need; name the tokenizer of a chat model, or give"
            f" --chat-template FILE"
        ) from None


def template_hash(template: str) -> str:
    """A short hash of a chat template."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def template_note(rows: Any, name: str, tokenizer: Any, model: str) -> str | None:
    """A note where a set of chats was made with another template than the one that a model's tokenizer has; else None.

    rows: a result of `open_rows`; name: of the set; model: the tokenizer's name.
    """
    meta = getattr(rows, "meta", {})
    made = (meta.get("chat") or {}).get("template_hash")
    own = getattr(tokenizer, "chat_template", None)
    if made is None or (own is not None and made == template_hash(str(own))):
        return None
    if meta.get("chat_template") is not None:
        place = f"takes the place of {model}'s own in" if own is not None else f"is added, since {model} has none, to"
        return f"the chat template of dataset {name} {place} the tokenizer that is saved"
    other = (
        f"another chat template than that of {model}" if own is not None else f"a chat template, and {model} has none"
    )
    return f"dataset {name} was made with {other}; the set does not hold it, so the model is saved without it"


def _marks_answers(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


# ----------------------------------------------------------------------------------------------- records to messages


def messages_of(value: Any, name: str) -> list[Message]:
    """Messages with `role` and `content`, from a field's value in either of the two forms; further keys are kept.

    Raises:
        _Refused: the value is neither, or a role or content is not allowed.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise _Refused(f"{name} is no list of messages")
    if not value:
        raise _Refused(f"{name} is empty")
    found = []
    for number, message in enumerate(value, 1):
        if "from" in message and "role" not in message:
            role, content, known = message["from"], message.get("value"), SHAREGPT
            more = {}
        elif "role" in message:
            role, content, known = message["role"], message.get("content"), dict(zip(ROLES, ROLES, strict=True))
            more = {key: entry for key, entry in message.items() if key not in ("role", "content")}
        else:
            raise _Refused(f"message {number} of {name} has neither role and content nor from and value")
        if role not in known:
            raise _Refused(f"role {role!r} of message {number} of {name} is not allowed; one of: {', '.join(known)}")
        if not isinstance(content, str) and not (content is None and more.get("tool_calls")):
            raise _Refused(f"content of message {number} of {name} is no text")
        found.append({"role": known[role], "content": content} | {k: v for k, v in more.items() if v is not None})
    return found


def learnt_of(value: list[Mapping[str, Any]], name: str) -> list[bool]:
    """Whether each message of a field's value may be a target: `weight` 0 of an answer says that it is none.

    Raises:
        _Refused: another weight, one that makes a target of a message that is not the assistant's, or a key that leaves
            the message out in other programs.
    """
    found = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of {name}"
        answer = SHAREGPT.get(str(message.get("role", message.get("from")))) == "assistant"
        weight = message.get("weight")
        if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
            raise _Refused(
                f"weight={weight!r} of {where} is not allowed; 1 for an answer to learn, 0 for one to leave out"
            )
        if weight and not answer:
            raise _Refused(f"weight={weight!r} of {where} is not allowed; only the assistant's messages are learnt")
        for key in _SWITCHES:
            if message.get(key) is not None and bool(message[key]) != answer:
                raise _Refused(
                    f"{key}={message[key]!r} of {where} is not allowed: all answers are learnt, and nothing else; "
                    "weight: 0 leaves one out"
                )
        found.append(weight is None or bool(weight))
    return found


def _texts_in(value: Any) -> Iterator[str]:
    """All texts of nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts_in(entry)


# ------------------------------------------------------------------------------------------------- messages to tokens


class Encoder:
    """Makes tokens and weights of records; one per process.

    Args:
        tokenizer: a tokenizer of the `tokenizers` library, because only these tell the places of tokens.
        read_special: whether special tokens that texts spell are read as these tokens.
    """

    def __init__(self, tokenizer: Any, read_special: bool) -> None:
        self._tokenizer, self._read_special = tokenizer, read_special
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)

    def encode(self, fields: ChatFields, record: Any) -> tuple[list[int], Weights]:
        """Token ids of a record, and 1 for those that are targets.

        Raises:
            _Refused: the record cannot be used.
        """
        values = {}
        for name in (fields.messages, fields.prompt, fields.completion):
            if name is None:
                continue
            if not isinstance(record, Mapping) or name not in record:
                has = ", ".join(sorted(record)) if isinstance(record, Mapping) else type(record).__name__
                raise _Refused(f"there is no field {name!r}; it has: {has}")
            values[name] = record[name]
        if any(map(has_half_a_pair, _texts_in(list(values.values())))):
            raise _Refused("a text has a lone surrogate, half of a pair of UTF-16, which is no character")
        if fields.messages is not None:
            messages = messages_of(values[fields.messages], fields.messages)
            return self._conversation(messages, 0, learnt_of(values[fields.messages], fields.messages))
        prompt, completion = values[str(fields.prompt)], values[str(fields.completion)]
        if isinstance(prompt, str) and isinstance(completion, str):
            return self._pair(prompt, completion)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise _Refused(f"{fields.prompt} and {fields.completion} are neither two texts nor two lists of messages")
        before = messages_of(prompt, str(fields.prompt))
        messages = [*before, *messages_of(completion, str(fields.completion))]
        learnt = [*learnt_of(prompt, str(fields.prompt)), *learnt_of(completion, str(fields.completion))]
        return self._conversation(messages, len(before), learnt)

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], Weights]:
        """BOS, prompt, completion, EOS; completion and EOS are targets."""
        if not completion:
            raise _Refused("the completion is empty")
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = not self._read_special
        found = backend.encode(prompt + completion, add_special_tokens=False)
        inside = self._inside(found.offsets, [(len(prompt), len(prompt) + len(completion))], "the completion")
        ids, weights = list(found.ids), inside.tolist()
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None:
            ids, weights = [bos, *ids], [0, *weights]
        if eos is not None:
            ids, weights = [*ids, eos], [*weights, 1]
        return ids, np.asarray(weights, np.uint8)

    def _conversation(self, messages: list[Message], first: int, learnt: list[bool]) -> tuple[list[int], Weights]:
        """A conversation, of which the assistant's messages from number `first` on are targets, as far as `learnt`."""
        answers = [number for number in range(first, len(messages)) if messages[number]["role"] == "assistant"]
        if not answers:
            raise _Refused("there is no message of the assistant")
        if not any(learnt[number] for number in answers):
            raise _Refused("weight is 0 in all messages of the assistant, so that nothing of it is learnt")
        if not self._read_special:
            for text in _texts_in(messages):
                for token in self._special:
                    if token in text:
                        raise _Refused(
                            f"a message spells the special token {token!r}, which the template could not tell from its"
                            f" own; take it out, or read it as this token with --allow-special-tokens"
                        )
        if _marks_answers(self._tokenizer.get_chat_template()):
            found = self._rendered(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                                   tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False})  # fmt: skip
            weights = np.asarray(found["assistant_masks"], np.uint8)
            if first:
                begin = len(self._before(messages, first, self._rendered(messages)))
                weights[np.asarray(found["offset_mapping"])[:, 0] < begin] = 0
            if not all(learnt[number] for number in answers):
                self._leave_out(weights, messages, [n for n in answers if not learnt[n]], found["offset_mapping"])
            ids = list(found["input_ids"])
        else:
            text = self._rendered(messages)
            spans = [self._answer(messages, number, text) for number in answers if learnt[number]]
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, weights = list(found["input_ids"]), self._inside(found["offset_mapping"], spans, "an answer")
        if not weights.any():
            raise _Refused("the chat template marks nothing of it as the assistant's")
        return ids, weights

    def _leave_out(
        self, weights: Weights, messages: list[Message], numbers: list[int], offsets: list[tuple[int, int]]
    ) -> None:
        """Set the weights of some answers to 0, with what the template writes behind them, in place."""
        text = self._rendered(messages)
        begins = np.asarray(offsets, np.int64).reshape(-1, 2)[:, 0]
        for number in numbers:
            begin, _ = self._answer(messages, number, text)
            weights[(begins >= begin) & (begins < len(self._rendered(messages[: number + 1])))] = 0

    def _rendered(self, messages: list[Message], **more: Any) -> Any:
        """`apply_chat_template` of messages: a text, unless `more` asks for tokens."""
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, **({"tokenize": False} | more))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise _Refused(f"the chat template refuses it: {' '.join(str(error).split())}") from None

    def _before(self, messages: list[Message], number: int, text: str) -> str:
        """The text that a model is given to write message `number` of a rendered conversation."""
        if number == 0:
            raise _Refused("it begins with the assistant, so the template does not say what comes before its answer")
        before: str = self._rendered(messages[:number], add_generation_prompt=True)
        if not text.startswith(before):
            raise _Refused(f"the chat template writes what is before message {number + 1} otherwise when more follows")
        return before

    def _answer(self, messages: list[Message], number: int, text: str) -> tuple[int, int]:
        """Where in a rendered conversation the answer that is message `number` begins and ends."""
        begin = len(self._before(messages, number, text))
        until: str = self._rendered(messages[: number + 1])
        if not text.startswith(until) or len(until) <= begin:
            raise _Refused(f"the chat template writes message {number + 1} otherwise when more follows")
        # Templates put a line break behind the token that ends a turn, where the model has stopped already.
        bare = until.rstrip()
        ended = len(bare) > begin and any(bare.endswith(token) for token in self._special)
        return begin, len(bare) if ended else len(until)

    @staticmethod
    def _inside(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], what: str) -> Weights:
        """1 for each token that lies in one of the spans of characters.

        Raises:
            _Refused: a token lies across the border of a span.
        """
        begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        inside = np.zeros(len(begins), np.uint8)
        for begin, end in spans:
            for border in (begin, end):
                if ((begins < border) & (border < ends)).any():
                    raise _Refused(
                        f"a token lies across the border of {what}; blanks belong to the beginning of what follows them"
                    )
            inside[(begins >= begin) & (begins < end)] = 1
        return inside


_encoder: Encoder | None = None  # of this process
_encoder_of: Any = None


def _encode(batch: tuple[ChatFields, list[Any]]) -> tuple[Ids, Weights, list[int], dict[int, str]]:
    """Ids and weights of all records in a row, the number of tokens of each, and index -> why it is refused.

    A few large arrays, because many small ones take longer to send to another process.
    """
    global _encoder, _encoder_of
    if _encoder is None or _encoder_of != (own_tokenizer(), reads_special()):
        _encoder, _encoder_of = Encoder(own_tokenizer(), reads_special()), (own_tokenizer(), reads_special())
    fields, records = batch
    ids: list[int] = []
    weights: list[Weights] = []
    sizes, refused = [], {}
    for index, record in enumerate(records):
        try:
            found, targets = _encoder.encode(fields, record)
        except _Refused as error:
            refused[index], found, targets = str(error), [], np.empty(0, np.uint8)
        ids += found
        weights.append(targets)
        sizes.append(len(found))
    return np.asarray(ids, np.uint32), np.concatenate(weights), sizes, refused


# ------------------------------------------------------------------------------------------------------- documents


def read_records(source: str, split: str = "train", as_json: bool = False) -> Iterator[tuple[Any, str]]:
    """Yield the records of a .jsonl or .parquet file, of a folder of them, or of a hub dataset, with their places.

    Raises:
        ConfigError: no such source, a file without records, or one that cannot be read.
    """
    source = expanded(source)
    path = Path(source)
    if path.is_dir():
        for file in chosen_files(path, (*JSON_SUFFIXES, ".parquet"), ".jsonl or .parquet"):
            yield from read_records(str(file), split, as_json)
    elif path.is_file():
        suffix = suffix_of(path)
        if as_json or suffix in JSON_SUFFIXES:
            yield from read_json(source)
        elif suffix == ".parquet":
            yield from _parquet_records(path)
        else:
            raise ConfigError(f"dataset {source} has no records; .jsonl, .jsonl.gz or .parquet")
    else:
        check_there(source)
        if is_local(source):
            raise ConfigError(f"dataset {source} has no records; .jsonl, .jsonl.zst or .parquet")
        for number, record in enumerate(hub_records(source, split, None), 1):
            yield record, f"{source} record {number}"


def _parquet_records(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: pip install 'scaled-rope[train]'") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{path} record {number}"
    except pyarrow.ArrowException as error:
        raise ConfigError(f"dataset {path} is not a whole Parquet file: {first_line(error)}") from None


def check_chat(tokenizer: Any, name: str) -> None:
    """Raise ConfigError for a tokenizer that does not tell the places of tokens, by which answers are found."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"tokenizer {name} does not tell where tokens lie in a text, which finding answers needs")


def _tell_unused(record: Any, place: str, fields: ChatFields, told: set[str]) -> None:
    """Say on stderr, each name once, which fields of a record and keys of its messages are not used. told: so far."""
    if not isinstance(record, Mapping):
        return
    used = {fields.messages, fields.prompt, fields.completion}
    unused = {"fields": {str(key) for key, value in record.items() if key not in used and value is not None}}
    lists = [record.get(str(name)) for name in used]
    messages = [one for value in lists if isinstance(value, list) for one in value if isinstance(one, Mapping)]
    keys: set[str] = set()
    for message in messages:
        found = {str(key) for key, value in message.items() if value is not None} - _READ
        keys |= found if "role" not in message else {key for key in found if key not in _template()}
    unused["keys of messages"] = keys
    for what, names in unused.items():
        new = sorted(name for name in names if f"{what} {name}" not in told)
        told.update(f"{what} {name}" for name in new)
        if new:
            print(f"note: dataset {place}: {what} that are not used: {', '.join(new)}", file=sys.stderr)


def _template() -> str:
    """The chat template of this process's tokenizer; empty where it has none."""
    try:
        return str(own_tokenizer().get_chat_template())
    except ValueError:
        return ""


def conversations(
    records: Iterable[tuple[Any, str]], fields: ChatFields, tokenizers: Tokenizers, refusals: Refusals
) -> Iterator[Document]:
    """Yield the document of each record, in order: its tokens, with everything around them, and the targets' weights.

    Raises:
        ConfigError: a record that cannot be used, unless `refusals` skips those.
    """
    places: list[list[str]] = []

    def batches() -> Iterator[tuple[ChatFields, list[Any]]]:
        batch: list[Any] = []
        named: list[str] = []
        for record, place in records:
            _tell_unused(record, place, fields, refusals.told)
            batch.append(record)
            named.append(place)
            if len(batch) == BATCH:
                places.append(named)
                yield fields, batch
                batch, named = [], []
        if batch:
            places.append(named)
            yield fields, batch

    for _, (ids, weights, sizes, refused) in tokenizers.map(_encode, batches()):
        named, end = places.pop(0), 0
        for index, size in enumerate(sizes):
            if index in refused:
                refusals.add(named[index], refused[index])
                continue
            begin, end = end, end + size
            yield Document(ids[begin:end], weights[begin:end], bare=True)
