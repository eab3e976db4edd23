"""The rotary kernel in place of a family's `apply_rotary_pos_emb`, module by module.

To find which pairs of dimensions a family's function rotates, it is run on tables and random heads, and its result is
compared with both pairings. A function that computes anything else is left alone.
"""

from __future__ import annotations

import dis
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from scaled_rope.errors import unknown
from scaled_rope.kernels import apply_rotary, kernel_backend
from scaled_rope.kernels.rotary import BACKENDS, VARIABLE
from scaled_rope.patching.rebind import APPLY, callers, globals_of, original, rebind
from scaled_rope.patching.rotary import Layout, lay_out

KERNELS = (*BACKENDS, "none")
_TABLES = "position_embeddings"
Rotation = Callable[..., tuple[Tensor, Tensor]]


def resolve_kernel(kernel: str) -> str | None:
    """The backend to install: None leaves the model's own function.

    Args:
        kernel: "auto": the Triton kernel on a machine with a GPU where Triton runs, or what `SCALED_ROPE_KERNEL` says;
            elsewhere there is nothing to gain, so None. "triton", "torch": that one. "none": None.

    Raises:
        ConfigError: unknown name, or triton where it cannot run.
    """
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    forced = os.environ.get(VARIABLE) if kernel == "auto" else None
    if "none" in (kernel, forced):
        return None
    chosen = kernel_backend(backend=kernel)
    # "auto" is decided call by call: a model may be patched on the CPU and moved later.
    return None if kernel == "auto" and chosen == "torch" and not forced else kernel


def fused_rotation(base: nn.Module, layout: Layout, half: int, backend: str) -> tuple[Rotation | None, str]:
    """Return the function to bind under `APPLY` in the attention modules of a base model; it takes half-width float32
    tables.

    Args:
        layout: the layout of tables that the family's own function takes.
        half: half of the rotated dimensions.

    Returns:
        The function and "", or None and, in a few words, why there is none.
    """
    interleaved, reason = pairing_of(base, layout, half)
    return (None, reason) if interleaved is None else (_rotation(interleaved, backend), "")


def pairing_of(base: nn.Module, layout: Layout, half: int) -> tuple[bool | None, str]:
    """Find which dimensions the attention of a base model rotates together.

    Args:
        layout, half: as in `fused_rotation`.

    Returns:
        Whether pairs are neighbours (True) or halves (False), and ""; or None and, in a few words, why it is neither.
    """
    pairings, reason = pairings_of(base, layout, half)
    if others := [name for name in pairings if name != APPLY]:
        return None, f"its attention may call {others[0]} in place of {APPLY}"
    return pairings.get(APPLY), reason


def pairings_of(base: nn.Module, layout: Layout, half: int) -> tuple[dict[str, bool], str]:
    """Find which dimensions each of the functions rotates together that the attention of a base model may call.

    Args:
        layout, half: as in `fused_rotation`.

    Returns:
        Name of the function -> as in `pairing_of`, and ""; or an empty dictionary and, in a few words, why there is a
        function of which it is not known. A function of another name than `APPLY` may return neighbours apart, all
        first ones before all second ones.
    """
    modules = callers(base, APPLY)
    if not modules:
        return {}, f"its attention calls no {APPLY}"
    if others := [type(module).__name__ for module in users_of_tables(base) if module not in modules]:
        return {}, f"{others[0]} rotates in its own way"
    found: dict[str, bool] = {}
    for name in dict.fromkeys(name for module in modules for name in rotations(module)):
        users = [module for module in modules if name in rotations(module)]
        pairings = {_pairing(original(module, name), layout, half, apart=name != APPLY) for module in users}
        if len(pairings) != 1 or (interleaved := pairings.pop()) is None:
            return {}, f"its {name} is not the common one"
        found[name] = interleaved
    return found, ""


def rotations(module: nn.Module) -> list[str]:
    """The global names of the functions that rotate queries and keys in a module's forward, `APPLY` first. Which of
    them is called may depend on the config (`rope_interleave` of multi-head latent attention)."""
    return sorted((name for name in globals_of(module) if "apply_rotary" in name), key=lambda name: name != APPLY)


def rotated_last(module: nn.Module) -> bool:
    """Whether an attention module rotates the last dimensions of its heads: in multi-head latent attention the part
    without rotation, which comes from the latent vector, goes before the part with it."""
    return hasattr(module, "qk_rope_head_dim") and hasattr(module, "qk_nope_head_dim")


def bind_rotation(base: nn.Module, rotation: Rotation) -> list[nn.Module]:
    """Bind a rotation in every attention module of a base model; return the modules."""
    modules = callers(base, APPLY)
    for module in modules:
        rebind(module, APPLY, rotation)
    return modules


def unbind_rotation(modules: list[nn.Module]) -> None:
    """Undo `bind_rotation`."""
    for module in modules:
        rebind(module, APPLY, None)


def _rotation(interleaved: bool, backend: str) -> Rotation:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        return apply_rotary(q, k, cos, sin, heads_first=unsqueeze_dim == 1, interleaved=interleaved, backend=backend)

    return apply_rotary_pos_emb


def users_of_tables(base: nn.Module) -> list[nn.Module]:
    """The innermost modules whose forward takes cos and sin, without recurrent layers, which leave them unused."""
    given = [module for module in base.modules() if _TABLES in inspect.signature(module.forward).parameters]
    innermost = [module for module in given if not any(other in given for other in list(module.modules())[1:])]
    return [module for module in innermost if _rotates(module)]


def _rotates(module: nn.Module) -> bool:
    """Whether a module's own forward may rotate by tables, by the names of what it calls."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or any("Attention" in part for part in (type(module).__name__, *code.co_names)):
        return True
    return any("rot" in name or "rope" in name for name in code.co_names)


def normalising(base: nn.Module) -> str:
    """The class of attention modules that normalise queries and keys after they have rotated them, as HunYuan's do, so
    that a factor on cos and sin is taken out again; "" where none does."""
    for module in base.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or not any("apply_rotary" in name for name in code.co_names):
            continue
        names = [str(step.argval) for step in dis.get_instructions(code)]
        last = max(index for index, name in enumerate(names) if "apply_rotary" in name)
        # Of queries and keys: others normalise values, or what attention returns.
        if any(name.startswith(("q", "k")) and "norm" in name and _has(module, name) for name in names[last:]):
            return type(module).__name__
    return ""


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)


@unset_fake_temporarily()  # a trial with numbers, also while a model is planned on tensors without any
def _pairing(apply: Callable[..., Any], layout: Layout, half: int, apart: bool = False) -> bool | None:
    """Whether a family's function pairs neighbours (True), halves (False), or does something else (None).

    apart: whether it may return all first neighbours before all second ones.
    """
    generator = torch.Generator().manual_seed(0)  # its own, so that the global random state stays
    plain: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    q, k = (torch.randn(1, heads, 3, 2 * half, **plain) for heads in (2, 1))
    angles = torch.randn(1, 3, half, **plain)
    cos, sin = angles.cos(), angles.sin()
    try:
        with torch.device("cpu"):  # whatever the default device is
            found = apply(q, k, lay_out(cos, layout), lay_out(sin, layout))
    except Exception:
        return None  # whatever it wants, it is not the common form
    for interleaved in (False, True):
        wanted = apply_rotary(q, k, cos, sin, interleaved=interleaved, backend="torch")
        separate = tuple(torch.cat((one[..., 0::2], one[..., 1::2]), dim=-1) for one in wanted)
        for heads in (wanted, separate) if apart and interleaved else (wanted,):
            if all(
                isinstance(one, Tensor) and one.shape == right.shape and torch.allclose(one, right, rtol=0, atol=1e-5)
                for one, right in zip(found, heads, strict=True)
            ):
                return interleaved
    return None
