"""A model behind a server that speaks OpenAI's completions API, as vLLM, SGLang and llama.cpp's server do.

Prompts are sent as token ids, so that the server's tokenizer and chat template have no part in the result. What comes
back is checked against what was sent. No other address is asked: redirects are not followed, proxies not used. The key
in OPENAI_API_KEY goes into the request's header and nowhere else.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.windows import Losses
from scaled_rope.results import Row

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the API key, if the server wants one."""

_AT_ONCE = 16
"""The most requests that wait for the server at one time."""
_PROBE = 4
"""Tokens of the prompt by which it is found out how the server gives log-probabilities."""
_ABOVE_ZERO = 1e-3
"""The most that a log-probability is above 0 by rounding."""
_NONE = -9999.0
"""The number that vLLM sends in place of minus infinity, which JSON does not have."""

# Ways to ask for the log-probabilities of a prompt, the cheapest first. vLLM and SGLang know the first two; the second
# is what lm-eval's local-completions asks for; the third is vLLM's own.
_WAYS: dict[str, Row] = {
    "echo": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "echo, one token more": {"echo": True, "logprobs": 1, "max_tokens": 1},
    "prompt_logprobs": {"prompt_logprobs": 0, "max_tokens": 1},
}


@dataclass(frozen=True)
class Address:
    """Where a server is: `http://host:port/v1`."""

    secure: bool
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read the value of `--server`.

        Raises:
            ConfigError: no such address, or one that holds a password or a query.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--server is not an address: {error}") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(f"--server must be an address alone, as http://host:8000/v1; a key goes into {KEY}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--server {url} is not allowed; an address such as http://host:8000/v1")
        return cls(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        port = "" if self.port is None else f":{self.port}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}{port}{self.path}"

    def request(self, method: str, path: str, body: Row | None, seconds: float) -> tuple[int, bytes]:
        """Send one request; return status and body.

        Raises:
            ConfigError: no connection, or no answer in time.
        """
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        connection = kind(self.host, self.port, timeout=seconds)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except TimeoutError:
            raise ConfigError(f"server {self}: no answer within {seconds:g} s (--server-timeout)") from None
        except ssl.SSLError as error:
            raise ConfigError(f"server {self}: no secure connection: {error.reason or error}") from None
        except (OSError, http.client.HTTPException) as error:
            why = error.strerror if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
            raise ConfigError(f"server {self}: no connection: {why or error or type(error).__name__}") from None
        except ValueError:  # a key with a line break, which must not be shown
            raise ConfigError(f"{KEY} cannot be sent: it holds characters that no header can have") from None
        finally:
            connection.close()


@dataclass(eq=False)
class ServedModel:
    """One model of a server.

    Attributes:
        address: of the API.
        name: the name under which the server knows the model.
        seconds: time to wait for an answer.
        software, version: of the server, where it says so.
        root: the folder or hub name that the server loaded, where it says so.
        max_length: the most tokens of prompt and answer together, where it says so.
    """

    address: Address
    name: str
    seconds: float = 600.0
    software: str | None = None
    version: str | None = None
    root: str | None = None
    max_length: int | None = None
    _way: str | None = field(default=None, init=False, repr=False)

    device = torch.device("cpu")
    """Where results arrive."""

    @classmethod
    def connect(cls, url: str, name: str | None = None, seconds: float = 600.0) -> ServedModel:
        """Ask a server for its models.

        name: one of them; None where there is only one.

        Raises:
            ConfigError: no such server, or no such model.
        """
        address = Address.parse(url)
        listed = ask_json(address, "GET", "/models", None, seconds)
        entries = listed.get("data") if isinstance(listed, dict) else None
        models = {one["id"]: one for one in entries or () if isinstance(one, dict) and isinstance(one.get("id"), str)}
        if not models:
            raise ConfigError(f"server {address}: lists no models at {address.path}/models")
        if name is None and len(models) > 1:
            raise ConfigError(f"server {address}: has several models; --served-name must be one of {_names(models)}")
        if name is not None and name not in models:
            raise ConfigError(f"--served-name {name}: server {address} has only {_names(models)}")
        name = name or next(iter(models))
        entry = models[name]
        software = entry.get("owned_by") if isinstance(entry.get("owned_by"), str) else None
        limit, root, meta = entry.get("max_model_len"), entry.get("root"), entry.get("meta")
        if limit is None and isinstance(meta, dict):  # llama.cpp, of one of its slots
            limit = meta.get("n_ctx")
        return cls(
            address,
            name,
            seconds,
            software,
            _version(address, software, min(seconds, 10.0)),
            root if isinstance(root, str) else None,
            limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else None,
        )

    @property
    def title(self) -> str:
        """The server in a few words: "vllm 0.11.0"."""
        return " ".join(filter(None, (self.software or "a server", self.version)))

    def facts(self) -> Row:
        """The server, as rows describe it."""
        known = {
            "url": str(self.address),
            "name": self.name,
            "software": self.software,
            "version": self.version,
            "root": self.root and self.root.rstrip("/").rpartition("/")[2],
            "max_length": self.max_length,
        }
        return {name: value for name, value in known.items() if value is not None}

    def fingerprint(self) -> str:
        """The stand-in for the weights in rows: the server and what it says about its model; it shows no weights."""
        said = [str(self.address), self.name, self.root, self.software, self.version, self.max_length]
        return "served-" + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def losses(self, rows: Sequence[Sequence[int]], scored: int) -> list[Losses]:
        """The losses in nats of the last `scored` tokens of each row of token ids, float32 [scored].

        Raises:
            ConfigError: the server gives no log-probabilities of prompts, or not those of these tokens.
        """
        way = self._way or self._find_way(list(rows[0][:_PROBE]))
        found = self._at_once(lambda ids: self._log_probabilities(ids, way), rows)
        return [np.array([-one for one in logs[len(logs) - scored :]], dtype=np.float32) for logs in found]

    def complete(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> list[str]:
        """The texts of greedy answers to prompts of token ids, each at most so many tokens long."""

        def ask(asked: tuple[Sequence[int], int]) -> str:
            ids, count = asked
            self.check_length(len(ids), count)
            choice, answer = self.choice(ids, {"max_tokens": count})
            self.check_count(answer, len(ids))
            if not isinstance(choice.get("text"), str):
                raise ConfigError(f"server {self.address}: an answer without a text")
            return str(choice["text"])

        return list(self._at_once(ask, list(zip(prompts, max_tokens, strict=True))))

    def _at_once(self, ask: Any, given: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(min(len(given), _AT_ONCE)) as pool:
            return list(pool.map(ask, given))

    def _find_way(self, probe: list[int]) -> str:
        """Find out, with a short prompt, how the server gives the log-probabilities of prompts.

        Raises:
            ConfigError: in no way that is known; or it cannot be reached.
        """
        whys = []
        for way in _WAYS:
            try:
                self._log_probabilities(probe, way)
            except Unsuitable as error:
                whys.append(error.why)
                continue
            self._way = way
            return way
        raise ConfigError(
            f"server {self.address}: gives no log-probabilities of prompts, which perplexity needs: {whys[0]}"
        )

    def _log_probabilities(self, ids: Sequence[int], way: str) -> list[float]:
        """The log-probabilities of a prompt's tokens, without the first.

        Raises:
            Unsuitable: the server does not give them in this way, or not those of these tokens.
        """
        options = _WAYS[way]
        self.check_length(len(ids), options["max_tokens"])
        choice, answer = self.choice(ids, {**options, "return_tokens_as_token_ids": True})
        self.check_count(answer, len(ids))
        try:
            found = _of_prompt_logprobs(choice, ids) if way == "prompt_logprobs" else _of_echo(choice, ids, options)
        except ValueError as error:
            raise Unsuitable(self.address, str(error)) from None
        for place, value in enumerate(found[1:], start=1):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not _NONE < value <= _ABOVE_ZERO:
                raise Unsuitable(self.address, f"token {place} of {len(ids)} has the log-probability {value}")
        return [float(value) for value in found[1:]]

    def check_length(self, tokens: int, more: int) -> None:
        """Raise a ConfigError for a prompt and `more` tokens that are longer than the server takes."""
        if self.max_length is not None and tokens + more > self.max_length:
            asked = f"{tokens} tokens" + (f" and {more} more" if more else "")
            raise ConfigError(f"server {self.address}: a prompt of {asked} is beyond its {self.max_length}; --lengths")

    def check_count(self, answer: Mapping[str, Any], sent: int) -> None:
        """Raise a ConfigError where the server read another number of tokens than were sent."""
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != sent:
            raise ConfigError(
                f"server {self.address}: read {counted} tokens where {sent} were sent; it adds or drops some"
            )

    def choice(self, ids: Sequence[int], options: Row) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Send a prompt of token ids with these options; return the only choice of the answer, and the answer.

        Raises:
            Unsuitable: the server refuses the request.
            ConfigError: no answer, or none of that form.
        """
        body = {"model": self.name, "prompt": [int(one) for one in ids], "temperature": 0.0, **options}
        answer = ask_json(self.address, "POST", "/completions", body, self.seconds, f"a prompt of {len(ids)} tokens")
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ConfigError(f"server {self.address}: an answer without a choice")
        return choices[0], answer


class Unsuitable(ConfigError):
    """The server does not do what one way to ask for log-probabilities needs."""

    def __init__(self, address: Address, why: str) -> None:
        super().__init__(f"server {address}: {why}")
        self.why = why


def _of_echo(choice: Mapping[str, Any], ids: Sequence[int], options: Row) -> Sequence[Any]:
    """The log-probabilities of a prompt that was given back in front of the answer; ValueError for other tokens."""
    logs = choice.get("logprobs")
    values = logs.get("token_logprobs") if isinstance(logs, dict) else None
    if not isinstance(values, list):
        raise ValueError("the answer has none")
    if not len(ids) <= len(values) <= len(ids) + options["max_tokens"]:
        raise ValueError(f"{len(values)} log-probabilities for {len(ids)} tokens that were sent")
    assert isinstance(logs, dict)
    for sent, token in zip(ids, logs.get("tokens") or (), strict=False):
        if isinstance(token, str) and token.startswith("token_id:") and token != f"token_id:{sent}":
            raise ValueError(f"token {token.partition(':')[2]} came back where {sent} was sent")
    return values[: len(ids)]


def _of_prompt_logprobs(choice: Mapping[str, Any], ids: Sequence[int]) -> Sequence[Any]:
    """The log-probabilities of a prompt in vLLM's own field: for each token, an object by token id; or ValueError."""
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise ValueError("the answer has none")
    if len(entries) != len(ids):
        raise ValueError(f"{len(entries)} log-probabilities for {len(ids)} tokens that were sent")
    values: list[Any] = [None]
    for sent, entry in zip(ids[1:], entries[1:], strict=True):
        one = entry.get(str(int(sent))) if isinstance(entry, dict) else None
        if not isinstance(one, dict):
            raise ValueError(f"the log-probability of token {sent} is missing")
        values.append(one.get("logprob"))
    return values


def ask_json(
    address: Address, method: str, path: str, body: Row | None, seconds: float, what: str = "the request"
) -> Any:
    """Send a request and read the answer.

    Raises:
        Unsuitable: a status from 400 to 499, but for a key or an address that is not there.
        ConfigError: no answer, or one that says no.
    """
    status, content = address.request(method, address.path + path, body, seconds)
    if status in (401, 403):
        state = "is refused" if os.environ.get(KEY) else "is needed, and is not set"
        raise ConfigError(f"server {address}: the key in {KEY} {state} (status {status})")
    if 300 <= status < 400:
        raise ConfigError(f"server {address}: sends us elsewhere (status {status}), which is not followed")
    if status == 404:
        raise ConfigError(f"server {address}: has no {address.path}{path} (status 404){_said(content)}")
    if 400 <= status < 500:
        raise Unsuitable(address, f"refuses {what} (status {status}){_said(content)}")
    if status != 200:
        raise ConfigError(f"server {address}: fails at {what} (status {status}){_said(content)}")
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ConfigError(f"server {address}: the answer at {address.path}{path} is not JSON") from None


def _said(content: bytes) -> str:
    """The error that an answer names, on one line and without the key, which some servers repeat."""
    try:
        found = json.loads(content)
        while isinstance(found, dict):
            found = found.get("error") or found.get("message") or found.get("detail")
        text = str(found or "")
    except (ValueError, RecursionError):
        text = ""
    line = " ".join(text.split())[:300]
    if key := os.environ.get(KEY):
        line = line.replace(key, "[key]")
    return f": {line}" if line else ""


def _names(models: Mapping[str, Any]) -> str:
    return ", ".join(sorted(models))


_VERSION_PLACES = {"vllm": ("/version", "version"), "sglang": ("/get_server_info", "version"),
                   "llamacpp": ("/props", "build_info")}  # fmt: skip
"""Software as /models names it -> where it says its version."""


def _version(address: Address, software: str | None, seconds: float) -> str | None:
    """The version of a server; None where it does not say."""
    place = _VERSION_PLACES.get(software or "")
    if place is None:
        return None
    try:
        status, content = address.request("GET", address.path.removesuffix("/v1") + place[0], None, seconds)
        found = json.loads(content).get(place[1]) if status == 200 else None
    except (ConfigError, ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
