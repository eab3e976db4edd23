"""The table of checks."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

from scaled_rope import serving
from scaled_rope.serving import checks
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding

MODULES = [module.name for module in pkgutil.iter_modules(serving.__path__) if module.name.startswith("checks_")]


def test_every_check_is_in_the_table_once() -> None:
    written = []
    for name in MODULES:
        module = importlib.import_module(f"scaled_rope.serving.{name}")
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                takes = list(inspect.signature(function).parameters)
                gives = inspect.signature(function).return_annotation
                if not function.__name__.startswith("_") and takes == ["facts"] and gives == "Iterator[Finding]":
                    written.append(function)
    assert len(written) > 20
    assert sorted(check.__name__ for check in checks.CHECKS) == sorted(check.__name__ for check in written)


def test_findings_are_listed_once_and_the_worst_first(monkeypatch: pytest.MonkeyPatch) -> None:
    info, warning, error = (Finding(level, level, "text") for level in ("info", "warning", "error"))
    other = Finding("other", "error", "text")
    monkeypatch.setattr(checks, "CHECKS", (lambda facts: [info, error], lambda facts: [warning, other, info]))
    assert checks.run_checks(ConfigFacts()) == (error, other, warning, info)


def test_a_config_that_says_nothing_has_no_findings() -> None:
    assert checks.run_checks(ConfigFacts()) == ()
