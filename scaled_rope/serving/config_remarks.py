"""The findings of `inspect` on a config.json: notes of commands that go on with it, or the reason why they do not."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

from scaled_rope.checkpoint import load_config, raw_config
from scaled_rope.errors import ConfigError
from scaled_rope.serving.checks import run_checks
from scaled_rope.serving.config_facts import ConfigFacts, read_facts

_L = "original_max_position_embeddings"
_UNREADABLE = ("bad-value", "unknown-type", "no-factor")
"""Codes of findings that say why no scaling can be read."""


def load_readable(name: str, source: str) -> Any:
    """`checkpoint.load_config`; where that fails by what the config says of RoPE, in the words of `inspect`.

    Args:
        name: of the model.
        source: as the user wrote it.

    Raises:
        ConfigError: no config, or one that cannot be read.
    """
    try:
        return load_config(name)
    except ConfigError:
        config_remarks(raw_config(name), source)
        raise


def config_remarks(
    raw: Mapping[str, Any],
    name: str,
    scaling: str = "checkpoint",
    decided: bool = False,
    without: Collection[str] = (),
    length: int | None = None,
) -> list[str]:
    """The errors and warnings about a config.json, and lengths that it does not say itself, one line each.

    Args:
        raw: the config as it is written: the object that transformers makes of it says more than its author did.
        name: of the model, for messages.
        scaling: the spec that was asked for.
        decided: whether the caller was told what counts where it is open which scaling the config carries.
        without: codes of findings that the caller says itself.
        length: the length in tokens that was asked for.

    Raises:
        ConfigError: it is open which scaling the config carries, `scaling` depends on that, and nothing was decided; no
            scaling can be read; a bad spec, or a config that says nothing of a model.
    """
    carried = is_carried(scaling)
    facts = read_facts(dict(raw), name, spec=None if carried else scaling)
    remarks = []
    for finding in run_checks(facts):
        if finding.level == "error" and facts.own is None and finding.code in _UNREADABLE:
            raise ConfigError(
                f"model {name!r}: [{finding.code}] {finding.text} {finding.remedy} `scaled-rope repair "
                f"{shlex.quote(name)}` writes what is meant, where that is clear"
            )
        if (finding.level == "info" and finding.code != "known-original") or finding.code in without:
            continue
        if finding.code in ("factor-twice", "known-original") and f"{_L}=" in scaling:
            continue  # the spec says it
        # PI divides by the factor alone: with the length given, L decides nothing that is left open.
        by_length = finding.code == "factor-twice" and length is not None
        fixed = facts.own is not None and facts.own.method == "linear" and not facts.own.is_length_dependent
        settled = decided or (by_length and fixed)
        if carried and not settled and (instead := _instead(facts, finding.code)):
            repair = f"scaled-rope repair {shlex.quote(name)}"
            raise ConfigError(
                f"model {name!r}: [{finding.code}] {finding.text} {finding.remedy} `{repair}` writes what is meant; "
                f"or go on with {instead}"
            )
        remarks.append(f"config.json, {finding.level} [{finding.code}]: {finding.text} {finding.remedy}".strip())
    return remarks


def is_carried(scaling: str) -> bool:
    """Whether a spec depends on the scaling that the checkpoint carries."""
    return scaling.partition(",")[0].partition(":")[0] == "checkpoint" or ":checkpoint" in scaling


def _instead(facts: ConfigFacts, code: str) -> str:
    """The flag that decides what a finding leaves open; empty for a finding that leaves nothing open."""
    if code == "factor-twice" and facts.own is not None:
        return f"--scaling {facts.own.method}:{facts.own.factor:g},{_L}=TOKENS"
    return "--scaling METHOD:FACTOR, or --scaling default" if code == "misspelt-key" else ""
