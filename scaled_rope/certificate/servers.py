"""Servers as sources of log-probabilities: OpenAI's completions API, and what SGLang and llama.cpp have beside it.

All requests go to the host and port that were named; see `scaled_rope.evaluation.served_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaled_rope.certificate.observed import TOP, Observed
from scaled_rope.errors import ConfigError, is_number, shortened, unknown
from scaled_rope.evaluation.served_model import Address, ServedModel, Unsuitable, ask_json
from scaled_rope.flags.serving import PROTOCOLS
from scaled_rope.results import Row

_WHOLE_LIMIT = 8192
"""Tokens of a prompt beyond which a server is asked for its last position alone: the answer grows with the prompt."""
_LOWEST = -1000.0
"""Log-probabilities below it stand for minus infinity, which JSON does not have; nothing can be compared with them."""

Row_ = tuple[list[int], list[float]]
"""Token ids and their log-probabilities at one position."""


def connect(
    url: str,
    name: str | None,
    seconds: float,
    protocol: str = "auto",
    tokenizer: Any = None,
    probe: Sequence[int] = (0, 1),
) -> OpenAiSource | SglangSource | LlamaCppSource:
    """The source behind a server's address.

    Args:
        protocol: a name in `flags.PROTOCOLS`; "auto" goes by what the server says it is.
        tokenizer: of the model, for servers that say tokens as texts alone.
        probe: token ids of a short prompt, to find out what an OpenAI server gives.

    Raises:
        ConfigError: no such server, or no such model.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "llama.cpp":  # its native API needs no name, and an older server lists none
        return LlamaCppSource(_named(url, name, seconds))
    model = ServedModel.connect(url, name, seconds)
    if protocol == "sglang" or (protocol == "auto" and model.software == "sglang"):
        return SglangSource(model)
    if protocol == "auto" and model.software == "llamacpp":
        return LlamaCppSource(model)
    source = OpenAiSource(model, tokenizer)
    source.find_way(probe)
    return source


def _named(url: str, name: str | None, seconds: float) -> ServedModel:
    try:
        return ServedModel.connect(url, name, seconds)
    except ConfigError as error:
        if "lists no models" not in str(error) and "status 404" not in str(error):
            raise
        return ServedModel(Address.parse(url), name or "model", seconds, software="llamacpp")


def _native(model: ServedModel) -> Address:
    """The address of a server's own API, which lies beside /v1."""
    return replace(model.address, path=model.address.path.removesuffix("/v1"))


def _observed(model: ServedModel, ids: Sequence[int], rows: Mapping[int, Row_]) -> Observed:
    """The rows that say something.

    Raises:
        Unsuitable: none does, or a number that is no log-probability.
    """
    kept: dict[int, Row_] = {}
    for position, (tokens, logs) in sorted(rows.items()):
        if not all(is_number(value) and value < 1e-3 for value in logs):
            raise Unsuitable(model.address, f"what it says after token {position} are no log-probabilities")
        if (strange := next((token for token in tokens if not 0 <= token < 2**31), None)) is not None:
            raise Unsuitable(model.address, f"it names token {shortened(str(strange), 40)}, which no model has")
        pairs = {token: value for token, value in zip(tokens, logs, strict=True) if value > _LOWEST}
        if pairs:
            kept[position] = list(pairs), list(pairs.values())
    if not kept:
        raise Unsuitable(model.address, "the answer has no log-probabilities")
    return Observed(
        tuple(ids),
        tuple(kept),
        tuple(np.array(tokens, dtype=np.int64) for tokens, _ in kept.values()),
        tuple(np.array(logs, dtype=np.float64) for _, logs in kept.values()),
    )


class OpenAiSource:
    """A server of OpenAI's completions API.

    It is asked for the log-probabilities of the prompt itself where it gives these, or else of the next token.
    """

    def __init__(self, model: ServedModel, tokenizer: Any = None) -> None:
        self.model, self.title, self.max_length = model, model.title, model.max_length
        self._texts = _Texts(tokenizer)
        self._top = TOP
        self._way, self.whole = "next", False

    def find_way(self, probe: Sequence[int]) -> None:
        """Find out, with a short prompt, how many log-probabilities it gives, and whether those of prompts as well.

        Raises:
            ConfigError: it gives none.
        """
        why = ""
        for top in (TOP, 5, 1):
            self._top = top
            try:
                self._ask(probe, "next")
                break
            except Unsuitable as error:
                why = why or error.why
        else:
            raise ConfigError(f"server {self.model.address}: gives no log-probabilities of the next token: {why}")
        for way in ("prompt_logprobs", "echo"):
            try:
                rows = self._ask(probe, way)
            except Unsuitable:
                continue
            if len(rows) >= len(probe) - 1:
                self._way, self.whole = way, True
                return

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        way = self._way if len(positions) > 1 and len(ids) <= _WHOLE_LIMIT else "next"
        rows = self._ask(ids, way)
        wanted = set(positions) if way != "next" else {len(ids) - 1}
        return _observed(self.model, ids, {at: row for at, row in rows.items() if at in wanted})

    def _ask(self, ids: Sequence[int], way: str) -> dict[int, Row_]:
        self.model.check_length(len(ids), 1)
        options: Row = {"max_tokens": 1, "logprobs": self._top, "return_tokens_as_token_ids": True}
        if way == "echo":
            options["echo"] = True
        elif way == "prompt_logprobs":
            options["prompt_logprobs"] = self._top
        choice, answer = self.model.choice(ids, options)
        self.model.check_count(answer, len(ids))
        last = len(ids) - 1
        rows: dict[int, Row_] = {}
        logs = choice.get("logprobs")
        tops = self._rows_of(logs)
        if way == "echo":
            if len(tops) < len(ids):
                raise Unsuitable(self.model.address, "the answer has no log-probabilities of the prompt")
            rows = {at - 1: tops[at] for at in range(1, min(len(tops), len(ids) + 1)) if tops[at][0]}
        elif way == "prompt_logprobs":
            entries = choice.get("prompt_logprobs")
            if not isinstance(entries, list) or len(entries) != len(ids):
                raise Unsuitable(self.model.address, "the answer has no log-probabilities of the prompt")
            rows = {at - 1: _by_id(entry) for at, entry in enumerate(entries) if at}
        if way != "echo" and tops and tops[-1][0]:
            rows[last] = tops[-1]
        if last not in rows:
            raise Unsuitable(self.model.address, "the answer has no log-probabilities of the next token")
        return rows

    def _rows_of(self, logs: Any) -> list[Row_]:
        """The rows of the `logprobs` of a choice, in OpenAI's form or in llama.cpp's."""
        if not isinstance(logs, dict):
            return []
        if isinstance(logs.get("content"), list):
            return [_of_entries(one) for one in logs["content"]]
        tops = logs.get("top_logprobs")
        texts, values = logs.get("tokens"), logs.get("token_logprobs")
        named = list(zip(texts, values, strict=False)) if isinstance(texts, list) and isinstance(values, list) else []
        if not isinstance(tops, list):
            tops = [None] * len(named)
        rows = []
        for at, top in enumerate(tops):
            pairs = dict(top) if isinstance(top, dict) else {}
            if at < len(named) and isinstance(named[at][0], str):
                pairs.setdefault(*named[at])
            found = {self._texts.token(text): value for text, value in pairs.items() if value is not None}
            found.pop(None, None)
            rows.append(([token for token in found if token is not None], list(found.values())))
        return rows


class _Texts:
    """Token ids by the texts that a server gives instead, as far as these are of one token alone."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int | None] | None = None

    def token(self, text: str) -> int | None:
        if text.startswith("token_id:") and _is_number(text[9:]):
            return int(text[9:])
        if self._tokenizer is None:
            return None
        if self._ids is None:
            ids: dict[str, int | None] = {}
            for token in self._tokenizer.get_vocab().values():
                shown = self._tokenizer.decode([token])
                ids[shown] = None if shown in ids or "\ufffd" in shown else token
            self._ids = ids
        return self._ids.get(text)


def _by_id(entry: Any) -> Row_:
    """A row of vLLM's `prompt_logprobs`: an object by token id."""
    found: dict[int, Any] = {
        int(token): one.get("logprob")
        for token, one in (entry.items() if isinstance(entry, dict) else ())
        if _is_number(token) and isinstance(one, dict)
    }
    return list(found), list(found.values())


def _is_number(text: str) -> bool:
    """Whether a text is a token id: of digits, and not of more than Python turns into a number."""
    return text.isascii() and text.isdecimal() and len(text) < 100


class SglangSource:
    """A server of SGLang, by its native endpoint."""

    whole = True

    def __init__(self, model: ServedModel) -> None:
        self.model, self.title, self.max_length = model, model.title, model.max_length
        self._address = _native(model)

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        self.model.check_length(len(ids), 1)
        all_of_them = len(positions) > 1 and len(ids) <= _WHOLE_LIMIT
        body = {
            "input_ids": [int(one) for one in ids],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0 if all_of_them else len(ids) - 1,
            "top_logprobs_num": TOP,
        }
        what = f"a prompt of {len(ids)} tokens"
        answer = ask_json(self._address, "POST", "/generate", body, self.model.seconds, what)
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise ConfigError(f"server {self._address}: the answer at /generate has no meta_info")
        self.model.check_count({"usage": {"prompt_tokens": meta.get("prompt_tokens")}}, len(ids))
        rows: dict[int, Row_] = {}
        before = meta.get("input_top_logprobs")
        if all_of_them and isinstance(before, list) and len(before) == len(ids):
            rows = {at - 1: _of_triples(entry) for at, entry in enumerate(before) if at}
        after = meta.get("output_top_logprobs")
        if isinstance(after, list) and after:
            rows[len(ids) - 1] = _of_triples(after[0])
        wanted = set(positions)
        try:
            return _observed(self.model, ids, {at: row for at, row in rows.items() if at in wanted})
        except Unsuitable as error:
            raise ConfigError(f"server {self._address}: gives no log-probabilities: {error.why}") from None


def _of_triples(entry: Any) -> Row_:
    """A row of SGLang: [log-probability, token id, text] for each token."""
    given = entry if isinstance(entry, list) else []
    triples = [one for one in given if isinstance(one, list) and len(one) >= 2 and isinstance(one[1], int)]
    return [one[1] for one in triples], [one[0] for one in triples]


class LlamaCppSource:
    """A server of llama.cpp, by its native endpoint, which gives the log-probabilities of the next token alone."""

    whole = False

    def __init__(self, model: ServedModel) -> None:
        self.model, self.title, self.max_length = model, model.title, model.max_length
        self._address = _native(model)

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        self.model.check_length(len(ids), 1)
        body = {
            "prompt": [int(one) for one in ids],
            "n_predict": 1,
            "n_probs": TOP,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        what = f"a prompt of {len(ids)} tokens"
        answer = ask_json(self._address, "POST", "/completion", body, self.model.seconds, what)
        if not isinstance(answer, dict):
            raise ConfigError(f"server {self._address}: the answer at /completion is no object")
        read = answer.get("tokens_evaluated")
        # It says so as well where the prompt was read and its context ends with the answer.
        if answer.get("truncated") is True and read != len(ids):
            raise ConfigError(f"server {self._address}: cut off {what}, which is beyond its context; --lengths")
        self.model.check_count({"usage": {"prompt_tokens": read}}, len(ids))
        entries = answer.get("completion_probabilities")
        row: Row_ = ([], [])
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            row = _of_entries(entries[0])
        try:
            return _observed(self.model, ids, {len(ids) - 1: row})
        except Unsuitable as error:
            raise ConfigError(f"server {self._address}: gives no log-probabilities: {error.why}") from None


def _of_entries(entry: Any) -> Row_:
    """A row of llama.cpp: `top_logprobs`, or `top_probs` where these were asked for."""
    tops: Iterable[Any] = ()
    if isinstance(entry, dict):
        tops = entry.get("top_logprobs") or entry.get("top_probs") or ()
    found: dict[int, float] = {}
    for one in tops:
        if not isinstance(one, dict) or not isinstance(one.get("id"), int):
            continue
        value = one.get("logprob")
        if value is None and is_number(one.get("prob")) and one["prob"] > 0:
            value = math.log(one["prob"])
        if value is not None:
            found[one["id"]] = value
    return list(found), list(found.values())
