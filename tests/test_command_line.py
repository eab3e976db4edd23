"""How scripts end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
