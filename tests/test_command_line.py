"""How scripts end."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from scaled_rope.command_line import Parser
from scaled_rope.flags.search import add_advise_arguments, add_search_arguments, add_tune_arguments
from tests.helpers import ROOT


@pytest.mark.parametrize(("raised", "code"), [("KeyboardInterrupt", -signal.SIGINT), ("ZeroDivisionError", 1)])
def test_ctrl_c_while_a_script_imports_is_one_line(raised: str, code: int) -> None:
    """Ended as killed by SIGINT, so that shells stop as well; other exceptions keep their traceback."""
    words = f"from scaled_rope.command_line import refuse_early\nrefuse_early(lambda: None)\nraise {raised}"
    done = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    if raised == "KeyboardInterrupt":
        assert done.stderr == "interrupted; run the same command again to continue\n"
    else:
        assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("name", "add", "words"),
    [
        ("advise", add_advise_arguments, ["some model", "--target", "4096"]),
        ("advise", add_advise_arguments, ["m", "--target", "9", "--minutes", "2.125", "--scaling", "yarn:2",
                                          "--scaling", "linear:2", "--only"]),
        ("search", add_search_arguments, ["m", "--target", "9", "--seed", "3"]),
        ("tune", add_tune_arguments, []),
        ("tune", add_tune_arguments, ["--model", "m", "--windows", "4", "--constants", "--factors", "1.5,2"]),
    ],
)  # fmt: skip
def test_a_command_is_repeated_with_what_it_was_given(
    name: str, add: Callable[[argparse.ArgumentParser], None], words: list[str]
) -> None:
    parser = Parser(f"scaled-rope {name}")
    add(parser)
    assert parser.repeat(parser.parse_args([*words, "--hide-progress"])) == ["scaled-rope", name, *words]


def test_numbers_of_a_repeated_command_are_exact() -> None:
    parser = Parser("x")
    parser.add_argument("--share", type=float, default=0.5)
    for given, said in (("20.0", "20"), ("1234567.25", "1234567.25"), ("0.1", "0.1"), ("1e300", "1e+300")):
        repeated = parser.repeat(parser.parse_args(["--share", given]))
        assert repeated == ["x", "--share", said]
        assert parser.parse_args(repeated[1:]).share == float(given)
