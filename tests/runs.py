"""Training runs for tests: a tiny model with data and recipe, ways to launch it, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from scaled_rope.data import PackedWriter
from scaled_rope.tracking import MEASURED

ROOT = Path(__file__).parent.parent
LENGTH = 48
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
_PORTS = iter(range(29521, 29600))


def make_workspace(folder: Path) -> None:
    """A tiny untied Llama (4 heads, 2 key/value heads) with tokenizer, the same with dropout, a recipe, and a packed
    set with loss weights, whose first rows weigh much more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t1")
    for name, dropout in (("model", 0.0), ("dropout", 0.1)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
            attention_dropout=dropout,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    with PackedWriter(folder / "set", LENGTH, 64, weighted=True) as writer:
        for index in range(20):
            row = np.arange(LENGTH) * (1 + index % 3) % 60 + rng.integers(0, 3, LENGTH)
            writer.append(row, np.where(rng.random(LENGTH) < 0.5, 0, 1 + index % 7))
        writer.close({})
    fields = {
        "model": str(folder / "model"), "dataset": str(folder / "set"), "scaling": "yarn:3", "sequence_length": LENGTH,
        "global_batch_size": 4, "max_train_steps": 8, "warmup_steps": 2, "learning_rate": 5e-3, "grad_norm": 1.0,
        "precision": "fp32", "checkpointing_steps": 3, "output_dir": str(folder / "out"),
        "heldout": str(folder / "set"), "heldout_lengths": [16, 48], "heldout_steps": 3, "heldout_rows": 3,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))


def command(workspace: Path, output: Path, launcher: tuple[str, ...] = (), extra: tuple[str, ...] = ()) -> list[str]:
    script = ["finetune.py", str(workspace / "recipe.yaml"), "--output-dir", str(output), *extra]
    return [sys.executable, *launcher, *script]


def run(
    workspace: Path,
    output: Path,
    launcher: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    environment: dict[str, str] = ENVIRONMENT,
) -> None:
    """One run to its end, by a launcher if one is given."""
    done = subprocess.run(
        command(workspace, output, launcher, extra),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


class Ranks:
    """Processes of one run, started as a cluster's scheduler does: no launcher, their places in the environment."""

    def __init__(
        self, workspace: Path, output: Path, ranks: int, engine: str = "", extra: tuple[str, ...] = (), **more: str
    ) -> None:
        shared = ENVIRONMENT | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(_PORTS))}
        if engine:
            shared |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"deepspeed/{engine}.json",
            }
        self.output = output
        self._processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            self._processes.append(
                subprocess.Popen(
                    command(workspace, output, (), extra), cwd=ROOT, env=shared | place | more, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def when(self, steps: int) -> Ranks:
        """Wait until so many steps are logged, while the run goes on."""
        path, deadline = self.output / "train_log.jsonl", time.monotonic() + 120
        while not (path.exists() and path.read_text().count("\n") >= steps):
            assert all(process.poll() is None for process in self._processes), self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self

    def signal(self, number: signal.Signals) -> Ranks:
        for process in self._processes:
            process.send_signal(number)
        return self

    def finish(self) -> list[tuple[int, str]]:
        """Exit code and output of every rank."""
        finished = []
        for process in self._processes:
            out, error = process.communicate(timeout=300)
            finished.append((process.returncode, out + error))
        return finished

    def succeed(self) -> None:
        for code, text in self.finish():
            assert code == 0, text[-4000:]


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def same(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the machine and the moment."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")
