"""Scripts that do what the campaign has to notice, and a small campaign in a process without threads."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError

PARTS = 12


def main(argv: Sequence[str]) -> int:
    """Write a file of several parts into a folder, in the way that the first argument names.

    sound: parts that are there are kept, and the file appears when it is whole.
    different: a file that is there counts as whole.
    lost: a file that is there without its end is an error.
    traceback: as sound, but Ctrl-C and a full disk are not caught.
    hang: as sound, but it waits for ever where a part is there already.
    orphans: as sound, with a process beside it that only a good end ends.
    """
    way, out = argv[0], Path(argv[1])
    whole, parts = out / "whole.txt", out / "parts"
    if way in ("different", "lost"):
        if whole.exists():
            if way == "lost" and not whole.read_text().endswith("end\n"):
                raise ConfigError(f"{whole} is not whole")
            return 0
        for number in range(PARTS):
            with open(whole, "a") as file:
                file.write(f"part {number}\n")
        with open(whole, "a") as file:
            file.write("end\n")
        return 0
    try:
        parts.mkdir(exist_ok=True)
        if way == "orphans" and (child := os.fork()) == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(30)
            os._exit(0)
        if way == "hang" and any(parts.iterdir()):
            time.sleep(1000)
        for number in range(PARTS):
            if not (parts / str(number)).exists():
                (parts / f"{number}.tmp").write_text(f"part {number}\n")
                os.rename(parts / f"{number}.tmp", parts / str(number))
        (out / "whole.tmp").write_text("".join((parts / str(number)).read_text() for number in range(PARTS)))
        os.rename(out / "whole.tmp", whole)
        if way == "orphans":
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    except (KeyboardInterrupt, OSError) as error:
        if way == "traceback":
            raise RuntimeError("not caught") from error
        raise
    return 0


def run_campaign(work: Path, runs: Sequence[str], counts: dict[str, dict[str, int]], **settings: Any) -> None:
    """A campaign over runs of this module by their way, or over real ones; rows go to work/trials.jsonl."""
    from benchmarks import campaign, campaign_runs, campaign_trials

    for name, value in settings.items():
        setattr(campaign_trials, name, value)
    for way in runs:
        argv = _argv(way)
        campaign_runs.RUNS[way] = dataclasses.replace(campaign_runs.RUNS["export"], module=__name__, argv=argv)
    campaign.Campaign(work, work / "trials.jsonl").run((), counts, time.monotonic() + 300)


def _argv(way: str) -> Any:
    return lambda inputs, out: [way, str(out)]


def campaign_rows(work: Path, runs: Sequence[str], counts: dict[str, dict[str, int]], **settings: Any) -> list[Any]:
    """The rows of `run_campaign` in a process that was forked where nothing has started threads."""
    from tests.helpers.runs import _FORKED

    process = _FORKED.Process(target=run_campaign, args=(work, runs, counts), kwargs=settings)
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return [json.loads(line) for line in (work / "trials.jsonl").read_text().splitlines()]
