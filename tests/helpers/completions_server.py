"""A server of OpenAI's completions API around a model of this process, and the ways in which such servers misbehave."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.patching.loading import load_model

NAME = "tiny"


class CompletionsServer(ThreadingHTTPServer):
    """Serves one model on a free port of this machine.

    Attributes:
        ways: the ways in which it gives log-probabilities of prompts: "echo 0", "echo 1" (by max_tokens), "prompt".
        fault: a fault by name, see `_Handler.do_POST`.
        listed: what /v1/models lists.
        key: the API key that it wants.
        asked: the bodies of the requests so far.
        top: the most log-probabilities per token that it gives; None: any number.
        as_ids: whether it can say tokens as "token_id:7".
        most: the most tokens that llama.cpp's endpoint reads; it drops what is more.
    """

    daemon_threads = True

    def __init__(self, model: str, scaling: str = "checkpoint") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = load_model(model, scaling=scaling, device="cpu")
        self.tokenizer = load_tokenizer(model)
        self.ways: set[str] = {"echo 0", "echo 1", "prompt"}
        self.fault = ""
        self.listed: list[dict[str, Any]] = [{"id": NAME, "owned_by": "vllm", "max_model_len": 1024, "root": "/m/tiny"}]
        self.key: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.top: int | None = None
        self.as_ids = True
        self.most: int | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextlib.contextmanager
def serving(model: str, scaling: str = "checkpoint") -> Iterator[CompletionsServer]:
    """Within this context, a server answers."""
    server = CompletionsServer(model, scaling)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def _refused(self) -> bool:
        given = self.headers.get("Authorization")
        if self.server.key is None or given == f"Bearer {self.server.key}":
            return False
        self._send(401, {"error": {"message": f"bad key {given}"}})
        return True

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.server.fault == "elsewhere":
            self._send(302, b"", Location="http://127.0.0.1:9/v1/models")
        elif self.path == "/version":
            self._send(200, {"version": "0.11.0"})
        elif self.path != "/v1/models":
            self._send(404, {"detail": "Not Found"})
        elif not self._refused():
            self._send(200, {"data": self.server.listed})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        fault = self.server.fault
        if self._refused():
            return
        if fault == "slow":
            time.sleep(3)
        if self.path == "/generate" and fault != "broken":
            self._generate(body)
        elif self.path == "/completion" and fault != "broken":
            self._completion(body)
        elif fault == "not JSON":
            self._send(200, b"<html>a proxy</html>")
        elif fault == "deep":
            self._send(200, b'{"choices": ' + b"[" * 100_000)
        elif fault == "broken":
            self._send(500, {"error": {"message": f"out of memory\nwith {self.headers.get('Authorization')}"}})
        elif fault == "no choice":
            self._send(200, {"choices": []})
        elif body["model"] != NAME:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        elif fault == "too long" and len(body["prompt"]) > 100:
            self._send(400, {"error": {"message": "maximum context length is 100 tokens"}})
        else:
            self._complete(body)

    def _complete(self, body: dict[str, Any]) -> None:
        ids, more = body["prompt"], body["max_tokens"]
        if self.server.fault == "adds a token":
            ids = [0, *ids]
        if self.server.top is not None and (body.get("logprobs") or 0) > self.server.top:
            return self._send(400, {"error": {"message": f"logprobs must be at most {self.server.top}"}})
        with self.server.lock, torch.inference_mode():
            new = self._decode(ids, more)
            logs = self.server.model(torch.tensor([ids + new]), use_cache=False).logits[0].double().log_softmax(-1)
        choice: dict[str, Any] = {"index": 0, "text": self.server.tokenizer.decode(new), "logprobs": None}
        if body.get("echo"):
            if f"echo {min(more, 1)}" not in self.server.ways:
                return self._send(400, {"error": {"message": "Only no echo is supported"}})
            given = ids + new
            values = [None, *(float(logs[at - 1, given[at]]) for at in range(1, len(given)))]
            tokens = [f"token_id:{token}" for token in given]
            if self.server.fault == "drops a value":
                values = values[: len(ids) - 1]
            if self.server.fault == "another token":
                tokens[2] = "token_id:3"
            if self.server.fault == "no number":
                values[2] = None
            if self.server.fault in ("above zero", "minus infinity"):
                values[2] = 0.5 if self.server.fault == "above zero" else -9999.0
            choice["logprobs"] = {"token_logprobs": values, "tokens": tokens}
            if body["logprobs"] > 1:
                choice["logprobs"]["top_logprobs"] = [None, *(self._top(row, body) for row in logs[: len(given) - 1])]
            if self.server.fault == "echo without values":
                choice["logprobs"] = None
        elif body.get("logprobs"):
            tops = [self._top(logs[len(ids) - 1 + at], body) for at in range(len(new))]
            chosen = [float(logs[len(ids) - 1 + at, token]) for at, token in enumerate(new)]
            names = [self._name(token, body) for token in new]
            choice["logprobs"] = {"tokens": names, "token_logprobs": chosen, "top_logprobs": tops}
            if self.server.fault == "no log-probabilities":
                choice["logprobs"] = None
            if self.server.fault == "numbers":
                choice["logprobs"] = {"tokens": 5, "token_logprobs": 5}
            if self.server.fault == "another vocabulary":
                tops[-1]["token_id:123456"] = -3.0
            if self.server.fault == "endless":
                tops[-1]["token_id:" + "9" * 50] = -3.0
        if body.get("prompt_logprobs") is not None and "prompt" in self.server.ways:
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": float(row[token])} for token in self._best(row, body, ids[at])}
                for at, row in enumerate(logs[: len(ids) - 1], start=1)
            ]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        self._send(200, {"choices": [choice], "usage": usage})

    def _name(self, token: int, body: dict[str, Any]) -> str:
        if body.get("return_tokens_as_token_ids") and self.server.as_ids:
            return f"token_id:{token}"
        return str(self.server.tokenizer.decode([token]))

    def _best(self, row: torch.Tensor, body: dict[str, Any], asked: int) -> list[int]:
        return list(dict.fromkeys([asked, *row.topk(max(body["prompt_logprobs"], 0)).indices.tolist()]))

    def _top(self, row: torch.Tensor, body: dict[str, Any]) -> dict[str, float]:
        values, tokens = row.topk(body["logprobs"])
        return {self._name(int(token), body): float(value) for token, value in zip(tokens, values, strict=True)}

    def _logs(self, ids: list[int]) -> torch.Tensor:
        with self.server.lock, torch.inference_mode():
            return self.server.model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)

    def _generate(self, body: dict[str, Any]) -> None:
        """SGLang's native endpoint."""
        ids, count = body["input_ids"], body["top_logprobs_num"]
        rows = [
            [[float(value), int(token), None] for value, token in zip(*row.topk(count), strict=True)]
            for row in self._logs(ids)
        ]
        meta = {"prompt_tokens": len(ids), "input_top_logprobs": [None, *rows[:-1]][body["logprob_start_len"] :]}
        self._send(200, {"text": "", "meta_info": meta | {"output_top_logprobs": rows[-1:]}})

    def _completion(self, body: dict[str, Any]) -> None:
        """llama.cpp's native endpoint."""
        ids = body["prompt"]
        cut = ids if self.server.most is None else ids[-self.server.most :]
        values, tokens = self._logs(cut)[-1].topk(body["n_probs"])
        tops = [
            {"id": int(token), "token": "", "logprob": float(value)}
            for value, token in zip(values, tokens, strict=True)
        ]
        ends = self.server.fault == "the context ends" or len(cut) < len(ids)
        answer = {"tokens_evaluated": len(cut), "truncated": ends}
        self._send(200, answer | {"completion_probabilities": [tops[0] | {"top_logprobs": tops}]})

    def _decode(self, ids: list[int], count: int) -> list[int]:
        """Greedy decoding, without a cache."""
        new: list[int] = []
        for _ in range(count):
            logits = self.server.model(torch.tensor([ids + new]), use_cache=False, logits_to_keep=1).logits
            new.append(int(logits[0, -1].argmax()))
        return new
