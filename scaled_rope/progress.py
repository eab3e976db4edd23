"""Progress of long work: a bar on a terminal, plain lines in a log, and the step of a script that the work is part of.

Knows nothing of the work.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

STEP = "SCALED_ROPE_STEP"
"""The environment variable by which a script says which of its steps a program is (`Step.parse`)."""
_SECONDS = 10.0  # between two lines of a log


@dataclass(frozen=True)
class Step:
    """One step of a script.

    Attributes:
        number, of: which step it is, counted from 1, and how many there are.
        before, now, later: the estimated work of the steps that the script has done, of this one and of those to come,
            all in one unit.
        began: when the script began, in seconds as `time.time()` counts.
        name: its name.
    """

    number: int
    of: int
    before: float
    now: float
    later: float
    began: float
    name: str

    @classmethod
    def parse(cls, text: str | None) -> Step | None:
        """Read "NUMBER OF BEFORE NOW LATER BEGAN NAME"; None for nothing, or for a text of another form."""
        words = (text or "").split(maxsplit=6)
        try:
            number, of, before, now, later, began = words[:6]
            return cls(int(number), int(of), float(before), float(now), float(later), float(began), words[6])
        except (ValueError, IndexError):
            return None

    def left(self, share: float, when: float, whole: float | None = None) -> float | None:
        """Seconds until the script ends, at its pace so far; None before there is one.

        share: of this step that is done, 0 to 1.
        when: now, as `time.time()` counts.
        whole: seconds that this step takes at its own pace, where that is known. It counts while no step before gives
            a pace: the script's time so far is mostly loading then, and a resumed step was done in part before.
        """
        if self.before == 0 and whole is not None and self.now > 0:
            return whole * (1 - share + self.later / self.now)
        done = self.before + share * self.now
        return (when - self.began) / done * (self.now * (1 - share) + self.later) if done > 0 else None

    def __str__(self) -> str:
        return f"step {self.number} of {self.of}: {self.name}"


def duration(seconds: float) -> str:
    """A time in words, rounded up: "40 s", "2 min", "1 h 5 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = -(-round(seconds) // 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Progress(tqdm):  # type: ignore[misc]  # it has no types
    """A progress bar of tqdm. On a terminal it is drawn there, as one short line where it is a step of a script.

    Elsewhere it writes a plain line now and then, and one at its end.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.step = Step.parse(os.environ.get(STEP))
        self.plain = not sys.stderr.isatty()
        options.setdefault("mininterval", _SECONDS if self.plain else 0.5)
        if self.plain:
            options.setdefault("delay", 1e-9)  # no line before anything is done
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        if file.isatty():
            return tqdm.status_printer(file)

        def write(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return write

    def __str__(self) -> str:
        if self.step is None and not self.plain:
            return str(super().__str__())
        return self.line(time.time())

    def line(self, when: float) -> str:
        """The state in one line: the step or the description, the share that is done, the time left.

        when: now, as `time.time()` counts.
        """
        facts = self.format_dict
        share = min(1.0, self.n / self.total) if self.total else None
        here = self.n - self.initial
        done = f"{self.n} {self.unit}" if share is None else f"{100 * share:.0f} %"
        left: float | None = None
        whole = facts["elapsed"] / here * (self.total or 0) if here > 0 else None  # seconds, at this bar's pace
        if self.step is not None and share is not None:
            left = self.step.left(share, when, whole)
        elif share is not None and whole is not None:
            left = whole * (1 - share)
        name = self.desc.removesuffix(": ") if self.desc else ""
        said = [f"{self.step or name or 'done'} {done}"]
        said += [f"{duration(left)} left"] if left is not None and left > 0 else []
        said += [f"({name})"] if self.step is not None and name else []
        said += [self.postfix] if self.postfix else []
        return ", ".join(said).replace(", (", " (")

    def close(self) -> None:
        if self.plain and not self.disable:
            if self.leave and self.n > self.initial and self.last_print_n != self.n:
                self.display()
            self.sp = None  # nothing more is written: tqdm would add an empty line
        super().close()
