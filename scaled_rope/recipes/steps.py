"""The steps of train.sh and eval.sh for a recipe, the work of each, and both in the words of a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from scaled_rope.recipes.evaluate_flags import EVALUATE_FIELDS
from scaled_rope.recipes.recipe import Recipe

_BACKWARD = 3
"""A token that is trained on costs about as much as three that are only read."""
_CONTROL = 4
"""So often a control reads each token: its windows overlap by three quarters."""


def steps(recipe: Recipe) -> dict[str, int]:
    """The steps of train.sh and eval.sh for a recipe, with the estimated work of each in tokens that a model reads.

    Good enough to say how many minutes are left; flags that give no lengths count as nothing.
    """
    found = {"texts": 0} if recipe.prepare else {}
    found["training"] = _BACKWARD * recipe.max_train_steps * recipe.tokens_per_step
    scalings = recipe.evaluate.get("scalings", ())
    for name in ("perplexity", "passkey"):
        flags = shlex.split(recipe.evaluate.get(name, ""))
        if flags:
            plural = "passkeys" if name == "passkey" else name
            fewer = shlex.split(recipe.evaluate.get(f"{name}_zero_shot", ""))
            first, others = _split_scalings(scalings, bool(fewer))
            if first:
                found[f"{plural} before training"] = sum(_tokens(name, flags, scaling) for scaling in first)
            if others:
                work = sum(_tokens(name, ["--control", "off", *fewer], scaling) for scaling in others)
                found[f"{plural} of scalings without training"] = work
            found[f"{plural} after training"] = _tokens(name, flags, recipe.scaling or "default")
    return found | ({"report": 0} if recipe.evaluate else {})


def _split_scalings(scalings: Sequence[str], apart: bool) -> tuple[list[str], list[str]]:
    """The scalings of the base that are measured with the evaluator's flags, and those with the flags for scalings
    without training: none unless there are such flags (`apart`)."""
    first = [scaling for scaling in scalings if not apart or scaling == "default"]
    return first, [scaling for scaling in scalings if scaling not in first]


def _tokens(evaluator: str, flags: Sequence[str], scaling: str) -> int:
    """The tokens that an evaluator reads under one scaling, as far as its flags tell."""

    def values(flag: str) -> list[str]:
        given = [flags[i + 1] for i in range(len(flags) - 1) if flags[i] == flag]
        given += [word.partition("=")[2] for word in flags if word.startswith(f"{flag}=")]
        return [part for text in given for part in text.split(",")]

    def count(flag: str) -> int:
        given = values(flag)[-1:]
        return int(given[0]) if given and given[0].isdigit() else 1

    lengths = [int(text) for text in values("--lengths") if text.isdigit()] or [0]
    if evaluator == "passkey":
        return count("--iterations") * max(1, len(values("--seeds"))) * max(1, len(values("--wording"))) * sum(lengths)
    once = sum(lengths) if "dynamic" in scaling else max(lengths)  # a static scaling needs the longest pass only
    texts = len(values("--dataset")) + len(values("-d"))
    control = 0 if values("--control")[-1:] == ["off"] else _CONTROL
    return max(1, texts) * count("--windows") * (once + control * max(lengths))


def shell_assignments(recipe: Recipe) -> str:
    """Bash assignments for train.sh and eval.sh: strings `model`, `output_dir`; arrays `prepare`, and the flags of
    `EVALUATE_FIELDS`, split as a shell splits words; for each evaluator NAME the flags `--scaling …` of the base with
    the flags of NAME (`NAME_scalings`) and with those of NAME_zero_shot (`NAME_zero_shot_scalings`); `steps` and
    `work`, as `steps` says.
    """
    arrays: dict[str, Sequence[str]] = {"prepare": recipe.prepare}
    arrays |= {name: shlex.split(recipe.evaluate.get(name, "")) for name in EVALUATE_FIELDS[1:]}
    for name in ("perplexity", "passkey"):
        split = _split_scalings(recipe.evaluate.get("scalings", ()), bool(arrays[f"{name}_zero_shot"]))
        for kind, scalings in zip((name, f"{name}_zero_shot"), split, strict=True):
            arrays[f"{kind}_scalings"] = [word for scaling in scalings for word in ("--scaling", scaling)]
    planned = steps(recipe)
    arrays |= {"steps": list(planned), "work": [str(work) for work in planned.values()]}
    lines = [f"{name}={shlex.quote(getattr(recipe, name) or '')}" for name in ("model", "output_dir")]
    lines += [f"{name}=({shlex.join(entries)})" for name, entries in arrays.items()]
    return "\n".join(lines)
