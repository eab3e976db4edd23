"""Training runs for tests: a tiny model with data and recipe, ways to launch it, and what a run leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors.torch import load_file

from scaled_rope.texts.packed import PackedWriter, open_packed
from tests.helpers import ROOT, rank_worker

LENGTH = 48
MEASURED = ("seconds", "tokens_per_second", "mfu", "peak_memory_gb")
"""Fields that depend on machine and moment, in rows that are otherwise the same whenever a step is done."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
# DeepSpeed looks for an accelerator when it is imported, and imports the compiler, which would start processes. Triton
# can interpret only what was so when it was imported; a run that does says TRITON_INTERPRET="1" as well.
_IMPORTING = ENVIRONMENT | {"DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TRITON_INTERPRET": "1"}
_FORKED = multiprocessing.get_context("forkserver")
# Of these what is missing is passed over. The last three are what DeepSpeed and FSDP import late.
_FORKED.set_forkserver_preload(
    ["tests.helpers.rank_worker", "finetune", "scaled_rope.training.loop", "accelerate",
     "transformers.models.llama.modeling_llama",
     "matplotlib.pyplot", "tqdm", "deepspeed.runtime.zero.muon.muon_optimizer",
     "deepspeed.runtime.sequence_parallel.ulysses_sp", "torch.distributed.checkpoint.state_dict"]
)  # fmt: skip


def make_workspace(folder: Path) -> None:
    """A tiny untied Llama (4 heads, 2 key/value heads) with tokenizer, the same with dropout and with tied
    embeddings, a recipe, and a packed set with loss weights, whose first rows weigh much more."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t1")
    for name, dropout, tied in (("model", 0.0, False), ("dropout", 0.1, False), ("tied", 0.0, True)):
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
            tie_word_embeddings=tied,
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


def reversed_set(source: Path, target: Path) -> None:
    """Write a packed set with the tokens of another in reverse, and its weights as they are."""
    rows = open_packed(source)
    with PackedWriter(target, rows.sequence_length, rows.meta["vocabulary"], rows.weighted) as writer:
        for index in range(len(rows)):
            tokens, _ = rows.row(len(rows) - 1 - index)
            writer.append(tokens[::-1], rows.row(index)[1])
        writer.close({})


def free_port() -> str:
    """A port that nothing listens on now, for ranks to meet at; tests of several checkouts can run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def command(workspace: Path, output: Path, extra: tuple[str, ...] = ()) -> list[str]:
    """Arguments of `finetune.py`."""
    return [str(workspace / "recipe.yaml"), "--output-dir", str(output), *extra]


def launch(workspace: Path, output: Path, launcher: tuple[str, ...]) -> None:
    """One run to its end by a launcher, as users start it."""
    words = [sys.executable, *launcher, "finetune.py", *command(workspace, output)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def _fsdp2_variables() -> dict[str, str]:
    """The settings that `accelerate launch` makes of configs/accelerate/fsdp2.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "finetune.py"]
    settings, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    variables = prepare_multi_gpu_env(settings)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


class Ranks:
    """Processes of one run, placed by their environment as a cluster's scheduler does it; one is placed nowhere.

    All runs of all numbers of ranks come from one launch: a process that imports everything once and is forked for each
    rank of each run. So a run starts in no time, in fresh processes, and what one leaves behind, crashed or deadlocked,
    does not reach the next.

    Args:
        engine: "ddp", "fsdp2", or a file of deepspeed/ without its ending.
        prepare: what each rank does before the run, as functions of a module.
        afresh: start new interpreters instead.
        more: further variables of the environment.
    """

    def __init__(
        self,
        workspace: Path,
        output: Path,
        ranks: int,
        engine: str = "ddp",
        extra: tuple[str, ...] = (),
        prepare: tuple[Callable[[], None], ...] = (),
        afresh: bool = False,
        **more: str,
    ) -> None:
        assert not (afresh and (prepare or engine == "fsdp2")), "a new interpreter cannot be prepared"
        environment = ENVIRONMENT | more
        if engine == "fsdp2":
            environment |= _fsdp2_variables()
            prepare = (*prepare, rank_worker.let_accelerate_shard_on_cpu)
        elif engine != "ddp":
            environment |= {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"deepspeed/{engine}.json",
            }
            if "offload" not in engine:  # the others compile nothing
                environment |= {"CXX": "no-compiler"}
        if ranks > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} | meeting
        self.output = output
        self._processes, self._files = [], []
        with mock.patch.dict(os.environ, _IMPORTING):  # the first of all starts what is forked
            for rank in range(ranks):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                number, name = tempfile.mkstemp(".txt", f"rank-{rank}-")
                os.close(number)
                arguments = (environment | place, command(workspace, output, extra), Path(name), prepare, afresh)
                self._processes.append(_FORKED.Process(target=rank_worker.work, args=arguments, daemon=True))
                self._processes[-1].start()
                self._files.append(Path(name))

    def when(self, steps: int) -> Ranks:
        """Wait until so many steps are logged, while the run goes on."""
        path, deadline = self.output / "train_log.jsonl", time.monotonic() + 120
        while not (path.exists() and path.read_text().count("\n") >= steps):
            assert all(process.exitcode is None for process in self._processes), self.finish()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        return self

    def signal(self, number: signal.Signals) -> Ranks:
        for process in self._processes:
            os.kill(process.pid, number)
        return self

    def finish(self) -> list[tuple[int, str]]:
        """Exit code and output of every rank. Once one has failed, the others are given a few seconds."""
        deadline = time.monotonic() + 400  # on a machine's first run DeepSpeed compiles
        while (running := [p for p in self._processes if p.exitcode is None]) and time.monotonic() < deadline:
            multiprocessing.connection.wait([process.sentinel for process in running], deadline - time.monotonic())
            if any(process.exitcode for process in self._processes):
                deadline = min(deadline, time.monotonic() + 15)
        for process in running:
            process.kill()
            process.join()
        texts = [path.read_text(errors="replace") for path in self._files]
        for path in self._files:
            path.unlink()
        return [(process.exitcode, text) for process, text in zip(self._processes, texts, strict=True)]

    def succeed(self) -> list[str]:
        """The output of each rank; all must have ended well."""
        finished = self.finish()
        shown = "\n".join(f"--- rank {n}, exit code {code}\n{text[-4000:]}" for n, (code, text) in enumerate(finished))
        assert all(code == 0 for code, _ in finished), shown
        return [text for _, text in finished]


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]


def same(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the machine and the moment."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")
