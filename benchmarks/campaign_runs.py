"""The runs that `campaign.py` disturbs: small, each with its inputs, its commands, and what it leaves behind.

Knows nothing of how runs are disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOAD = (
    "accelerate", "accelerate.utils", "deepspeed", "matplotlib.pyplot", "peft", "numpy", "safetensors.torch",
    "yaml", "tqdm", "transformers.models.llama.modeling_llama", "transformers.generation.utils",
    "torch.distributed", "torch.nn.parallel.distributed", "torch.optim.adamw", "torch._dynamo", "finetune",
    "tokenization", "truncate", "eval.perplexity", "eval.passkey", "eval.passkey_hard", "eval.quality",
    "eval.report", "scaled_rope.cli", "scaled_rope.training.loop", "scaled_rope.serving.export",
    "scaled_rope.tuning.search", "scaled_rope.certificate.command", "http.server", "multiprocessing.pool",
    "concurrent.futures.process",
)  # fmt: skip
"""Modules that the process imports from which all runs are forked."""

LENGTH = 48
_STORY = "A grey cat sat by the sea, and the sea sang to it of ships. Then the rain came. "


@dataclass(frozen=True)
class Run:
    """One command, small enough to be repeated hundreds of times.

    Attributes:
        module: where its `main` is.
        argv: its flags, given the folder of inputs and that of outputs.
        ranks: how many processes train together.
        needs_server: whether the environment names a server, in `CAMPAIGN_SERVER`.
        begin: flags that end it half-way, with states; None where there are none.
    """

    module: str
    argv: Callable[[Path, Path], Sequence[str]]
    ranks: int = 1
    needs_server: bool = False
    begin: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def _train(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda inputs, out: [str(inputs / "recipe.yaml"), "--output-dir", str(out / "run"), *more]


def _evaluation(*flags: str) -> Callable[[Path, Path], list[str]]:
    def argv(inputs: Path, out: Path) -> list[str]:
        words = [flag.format(inputs=inputs, out=out) for flag in flags]
        return ["-m", str(inputs / "model"), *words, "--device", "cpu", "--output", str(out / "rows.jsonl"),
                "--hide-progress"]  # fmt: skip

    return argv


def _words(*flags: str) -> Callable[[Path, Path], list[str]]:
    def argv(inputs: Path, out: Path) -> list[str]:
        places = {"inputs": inputs, "out": out, "server": os.environ.get("CAMPAIGN_SERVER", "")}
        return [flag.format(**places) for flag in flags]

    return argv


_TEXTS = ("--dataset", "{inputs}/texts")
_TOKENIZE = ("--dataset", "{inputs}/texts", "--tokenizer", "{inputs}/model", "--sequence-length", "32",
             "--output", "{out}/set")  # fmt: skip
_HALF = ("--stop-after", "4")

RUNS: dict[str, Run] = {
    "training": Run("finetune", _train(), begin=_HALF),
    "training, adapters": Run("finetune", _train("--lora", "--learning-rate", "1e-2"), begin=_HALF),
    "training, two ranks": Run("finetune", _train(), ranks=2, begin=_HALF),
    "perplexity": Run(
        "eval.perplexity",
        _evaluation(*_TEXTS, "--scaling", "yarn:4", "--scaling", "dynamic-yarn", "--lengths", "32,64,128",
                    "--output-file", "{out}/table.csv"),
    ),
    "perplexity, --save-nll": Run(
        "eval.perplexity",
        _evaluation(*_TEXTS, "--scaling", "yarn:4", "--scaling", "default", "--lengths", "32,64,128",
                    "--control", "--save-nll", "{out}/nll"),
    ),
    "passkeys": Run(
        "eval.passkey",
        _evaluation("--scaling", "yarn:4", "--dynamic-yarn", "--lengths", "140,200", "--iterations", "3",
                    "--heatmap", "{out}/map.svg"),
    ),
    "hard passkeys": Run(
        "eval.passkey_hard",
        _evaluation(*_TEXTS, "--scaling", "yarn:4", "--dynamic-yarn", "--lengths", "150,200", "--iterations", "2",
                    "--num-keys", "2", "--output-file", "{out}/answers.json"),
    ),
    "quality": Run(
        "eval.quality",
        lambda inputs, out: ["-m", str(inputs / "model"), "--scaling", "yarn:8", "--scaling", "linear:8",
                             "--dataset", str(inputs / "questions.jsonl"), "--device", "cpu", "--hide-progress",
                             "--output", str(out / "rows.jsonl"), "--output-file", str(out / "table.csv")],
    ),
    "tune": Run(
        "scaled_rope.cli",
        _words("tune", "-m", "{inputs}/model", "--dataset", "{inputs}/texts", "--factors", "2,4", "--grid",
               "0.9,1.1,1.3", "--output", "{out}/tune", "--device", "cpu", "--hide-progress"),
    ),
    "tokenization": Run("tokenization", _words(*_TOKENIZE, "--num-proc", "1")),
    "tokenization, two processes": Run("tokenization", _words(*_TOKENIZE, "--num-proc", "2")),
    "cutting anew": Run("truncate", _words("16", "{out}/cut", "--dataset", "{inputs}/set")),
    "report": Run(
        "eval.report",
        _words("{inputs}/rows.jsonl", "--output", "{out}/report", "--base", "base", "--finetuned", "run/model"),
    ),
    "export": Run(
        "scaled_rope.cli",
        _words("export", "{inputs}/model", "--for", "vllm", "--scaling", "yarn:4", "--output", "{out}/exported",
               "--force"),
    ),
    "certificate": Run(
        "scaled_rope.cli",
        _words("certify", "{inputs}/model", "--server", "{server}", "--scaling", "yarn:2", "--lengths", "24,60",
               "--html", "{out}/certificate.html", "--device", "cpu"),
        needs_server=True,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the inputs


def make_inputs(folder: Path) -> None:
    """Write what the runs read: models of a few thousand weights, texts, a packed set, questions, rows."""
    import numpy as np
    import yaml

    from scaled_rope.texts.packed import PackedWriter

    folder.mkdir(parents=True)
    _save_model(folder / "model", _byte_tokenizer(), max_position_embeddings=64)
    _save_model(folder / "trained", _word_tokenizer(), attention_dropout=0.1, max_position_embeddings=16)
    rng = np.random.default_rng(0)
    with PackedWriter(folder / "set", LENGTH, 64, weighted=True) as writer:
        for index in range(12):
            row = np.arange(LENGTH) * (1 + index % 3) % 60 + rng.integers(0, 3, LENGTH)
            writer.append(row, np.where(rng.random(LENGTH) < 0.5, 0, 1 + index % 7), [0, 20])
        writer.close({})
    recipe = {
        "model": str(folder / "trained"), "dataset": str(folder / "set"), "scaling": "yarn:3",
        "sequence_length": LENGTH, "global_batch_size": 2, "max_train_steps": 6, "warmup_steps": 2,
        "learning_rate": 5e-3, "grad_norm": 1.0, "precision": "fp32", "checkpointing_steps": 2,
        "output_dir": str(folder / "unused"), "heldout": str(folder / "set"), "heldout_lengths": [16, 48],
        "heldout_steps": 3, "heldout_rows": 2,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "texts").mkdir()
    for number, repeats in enumerate((12, 14, 10)):
        (folder / "texts" / f"{number}.txt").write_text(f"Text {number}. " + _STORY * repeats)
    questions = [
        {
            "article": _STORY * (2 + i % 2),
            "question": f"Question {i}?",
            "options": ["a", "b", "c", "d"],
            "answer": i % 4,
        }
        for i in range(4)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    _write_rows(folder / "rows.jsonl")


def _byte_tokenizer() -> Any:
    """Byte-level BPE with single digits that knows the words of the prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from scaled_rope.evaluation.choice_prompts import AFTER_STORY, BEFORE_STORY
    from scaled_rope.evaluation.passkey_prompts import FILLER, HARD_KEY_LINE, HARD_QUESTION, KEY_LINE, OPENING, QUESTION

    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    words = [OPENING, FILLER, KEY_LINE, QUESTION, HARD_KEY_LINE, HARD_QUESTION, BEFORE_STORY, AFTER_STORY, _STORY]
    inner.train_from_iterator(words * 10, trainer)
    return inner


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)} | {"<s>": 64, "</s>": 65}, unk_token="t2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def _save_model(folder: Path, tokenizer: Any, **settings: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=tokenizer.get_vocab_size(), initializer_range=0.2,
                         bos_token_id=0, eos_token_id=1, pad_token_id=1, **settings)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def _write_rows(path: Path) -> None:
    """Rows of perplexity and passkeys for a report, as the evaluators write them."""
    from scaled_rope.results import append_row
    from scaled_rope.scaling.record import RopeScaling

    base = RopeScaling("default", original_max_position_embeddings=64)
    made = {"command": "python x", "commit": None, "versions": {}, "device": "cpu", "cpu_count": 1,
            "date": "2026-01-01", "seed": 1}  # fmt: skip
    curves = {
        ("base", "default"): (40, 90, 180),
        ("base", "yarn:4"): (60, 62, 64),
        ("run/model", "yarn:4"): (38, 41, 42),
    }
    for (model, spec), curve in curves.items():
        scaling = RopeScaling.from_spec(spec, base)
        shared = {"model": model, "model_fingerprint": model, "dtype": "float32", "head_dim": 16,
                  "scaling": scaling.to_dict(), "label": scaling.label, "carried": model != "base" or spec == "default",
                  "provenance": made}  # fmt: skip
        for start, end, value in zip((0, 64, 128), (64, 128, 256), curve, strict=True):
            numbers = {"perplexity": value, "perplexity_bucket": value, "bucket": [start, end], "targets": 1}
            data = {"fingerprint": "d", "name": "text", "windows": 1}
            measured = {"metric": "perplexity", "data": data, "length": end, "protocol": {"bucket_start": start}}
            append_row(path, {**shared, **measured, **numbers})
        prompts = [{"depth": depth, "key": 1, "right": depth < 0.5} for depth in (0.0, 0.3, 0.6, 1.0)]
        numbers = {"n": 4, "right": 2, "accuracy": 0.5, "interval": [0.15, 0.85], "prompts": prompts}
        measured = {"metric": "passkey", "data": {"fingerprint": "p"}, "length": 64, "protocol": {"iterations": 4}}
        append_row(path, {**shared, **measured, **numbers})


# --------------------------------------------------------------------------------------------------- what a run leaves

_MEASURED = {"seconds", "tokens_per_second", "mfu", "peak_memory_gb", "peak_memory", "date", "provenance"}
"""Fields that differ between two runs of the same thing."""
_LEFT_OUT = {".lock", "provenance.yaml", "provenance.json"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if name not in _MEASURED}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return json.dumps([_plain(json.loads(line)) for line in data.splitlines()]).encode()
    if path.suffix == ".json":
        return json.dumps(_plain(json.loads(data))).encode()
    if path.suffix == ".safetensors":  # whose metadata are written in any order
        size = int.from_bytes(data[:8], "little")
        return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]
    if path.name == "README.md":
        return re.sub(rb"\| made by .*", b"", data)
    if path.suffix in (".html", ".svg"):
        data = re.sub(rb"<dc:date>.*?</dc:date>", b"", data)
        return re.sub(rb"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\.\d+)?(\+00:00)?", b"", data)
    return data


ANY_ORDER = ", in any order"


def left_by(out: Path) -> dict[str, str]:
    """Path -> hash of each file of a finished run, without times and dates. A folder that is empty counts as well.

    Files of result rows have a second entry, their path with `ANY_ORDER`.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() and not any(path.iterdir()):
            found[name] = "an empty folder"
        elif path.is_file() and path.name not in _LEFT_OUT and "damaged-" not in name:
            found[name] = hashlib.sha256(_content(path)).hexdigest()[:16]
            if path.name == "rows.jsonl":
                # A row that is measured alone needs a shorter pass, and says so.
                rows = [_plain(json.loads(line)) for line in path.read_bytes().splitlines()]
                lines = sorted(json.dumps({**row, "pass_length": None}) for row in rows)
                found[name + ANY_ORDER] = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return found
