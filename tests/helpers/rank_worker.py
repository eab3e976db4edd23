"""The work of a process of `runs.Ranks` after it was forked: one training run, in its place among the ranks."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def work(
    environment: dict[str, str],
    arguments: list[str],
    output: Path,
    prepare: tuple[Callable[[], None], ...],
    afresh: bool,
) -> None:
    """Run `finetune.py ARGUMENTS` with its output in a file; the exit code is that of the script.

    Args:
        prepare: called before the run; functions of a module, as they come here by their names.
        afresh: as a new interpreter, as users start it.
    """
    from tests.helpers import ROOT

    gc.freeze()  # what was imported is not to be looked through again, nor copied for that
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if afresh:
        os.execve(sys.executable, [sys.executable, "finetune.py", *arguments], environment)
    os.environ.clear()
    os.environ.update(environment)
    for function in prepare:
        function()
    import finetune
    from scaled_rope.command_line import run_cli

    sys.exit(run_cli(lambda: finetune.main(arguments)))


def small_pieces_of_logits() -> None:
    """Make the loss of a few tokens take several pieces."""
    import scaled_rope.patching.loss

    scaled_rope.patching.loss._LOGITS_PER_CHUNK = 64 * 8


def keep_states() -> None:
    """Keep a copy of the last state, in the folder kept of the run, which deletes its states at the end."""
    import shutil

    from scaled_rope.training import loop

    original = loop.save_state

    def save(accelerator: Any, recipe: Any, step: int) -> Any:
        final = original(accelerator, recipe, step)
        if accelerator.is_main_process:
            shutil.copytree(final, final.parent.parent / "kept", dirs_exist_ok=True)
        return final

    loop.save_state = save


def without_dropout() -> None:
    """Ranks draw their own, so only without it are they comparable with one."""
    import torch

    torch.nn.Dropout.forward = lambda self, x: x  # type: ignore[method-assign]


def ring_attention_on_cpu() -> None:
    """Let PyTorch's ring attention, which knows kernels of GPUs only, run with the flash attention of CPUs."""
    import torch
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    gradient = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def shards(tensors: Any, mesh: Any) -> tuple[Any, ...]:
        return tuple(DTensor.from_local(one, mesh, [Shard(2)], run_check=False) for one in tensors)

    def options(given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        given_names = dict(zip(("dropout_p", "is_causal"), given, strict=False))
        return {"dropout_p": 0.0, "is_causal": False} | given_names | named

    def forward(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        mesh, parts = given[0].device_mesh, [one.to_local() for one in given[:3]]
        found = ring._templated_ring_attention(mesh.get_group(), 2, kernel, *parts, **options(given[3:], named))
        return shards(found, mesh)

    def backward(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        mesh, (grad, *parts) = given[1].device_mesh, [one.to_local() for one in given[:6]]
        more = options(given[6:], named)

        def op(query: Any, key: Any, value: Any, out: Any, logsumexp: Any, grad_out: Any, **rest: Any) -> Any:
            return gradient(grad_out, query, key, value, out, logsumexp, **rest)

        causal = more.pop("is_causal")
        return shards(
            ring._templated_ring_attention_backward(
                mesh.get_group(), 2, op, grad, "grad_out", *parts, is_causal=causal, **more
            ),
            mesh,
        )

    ring.custom_ops[kernel.default], ring.custom_ops[gradient.default] = forward, backward


def let_accelerate_shard_on_cpu() -> None:
    """FSDP on CPU, which PyTorch has and accelerate doesn't select: there it would train unsynchronised copies."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    from scaled_rope.training import engine

    original = AcceleratorState.__init__

    def select_fsdp(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        is_first = not AcceleratorState._shared_state
        original(self, *arguments, **options)
        if is_first:
            assert self.distributed_type is DistributedType.MULTI_CPU, "then this function is needed no more"
            self.fsdp_plugin, self.distributed_type = options["fsdp_plugin"], DistributedType.FSDP
            if self._mixed_precision != "no":
                self.fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = select_fsdp  # type: ignore[method-assign]
    engine.check_fsdp = lambda: None
