"""One trial of `campaign.py`: a run is forked, disturbed, run again to its end, and what it left is compared.

A trial works in a process of its own, which starts the processes of the run as a shell or a launcher would. Outcomes:

    identical   the rerun left the same files as a run that nothing disturbed
    refused     it ended with exit code 2 and one line, or 1 where other models were measured; for damaged files only
    lost        it could not be brought to its end any more
    different   it ended well and left something else
    traceback   some process printed one
    hang        its processes neither ended nor computed for `SECONDS`, or computed for ten times as long
    orphans     processes outlived the one that started them
    wrong code  an exit code that does not say what happened, or an error that is not one line
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.campaign_runs import ANY_ORDER, RUNS, Run, left_by
from benchmarks.common import ROOT

GOOD = ("identical", "refused")
SECONDS = 60.0
_LEAST = 0.05  # seconds of a processor in that time that count as computing, on a machine that others use too
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DAMAGES = ("flip", "cut", "empty", "missing", "directory")
_GRACE = 10.0  # seconds that other ranks get after one has ended, as launchers give them
_WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.truncate",
            "shutil.rmtree", "shutil.copyfile", "shutil.move"}  # fmt: skip


class Bad(Exception):
    """A bad outcome: its name, and what shows it."""

    def __init__(self, outcome: str, shown: str) -> None:
        super().__init__(f"{outcome}: {shown}")
        self.outcome, self.shown = outcome, shown


@dataclass(frozen=True)
class Place:
    """Where a trial works. `out` has one path for all trials of a run, since rows and recipes record it."""

    inputs: Path
    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def text(self) -> Path:
        """The file for all that the processes print."""
        return self.folder / "said.txt"

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)


@dataclass
class Processes:
    """The processes of a started run; the first is the leader of their group."""

    ids: list[int]
    reader: threading.Thread
    codes: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    """Seconds of a processor that those of them that have ended used."""

    def signal(self, number: int, group: bool) -> None:
        if self.ids[0] in self.codes:
            return
        if group:
            os.killpg(self.ids[0], number)
        else:
            os.kill(self.ids[0], number)

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; whether they have."""
        limit = time.monotonic() + seconds
        while len(self.codes) < len(self.ids):
            for pid in self.ids:
                if pid not in self.codes:
                    found, status, used = os.wait4(pid, os.WNOHANG)
                    if found:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
                        self.seconds += used.ru_utime + used.ru_stime
            if time.monotonic() > limit:
                return False
            time.sleep(0.002)
        return True

    def wait_for_work(self, seconds: float) -> None:
        """Wait until the first has used so many seconds of a processor, or has ended."""
        stat = Path(f"/proc/{self.ids[0]}/stat")
        while not self.wait(0) and self.ids[0] not in self.codes:
            fields = stat.read_text().rpartition(") ")[2].split()
            if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
                return
            time.sleep(0.002)

    def finish(self) -> list[int]:
        """The exit codes; minus the signal's number where a process died of one.

        Raises:
            Bad: they did not end, or left others behind.
        """
        limit, used, last = time.monotonic() + SECONDS, 0.0, time.monotonic() + 10 * SECONDS
        while not self.wait(0.05) and not any(self.codes.values()) and time.monotonic() < min(limit, last):
            if (now := _processor_seconds(self.ids[0])) > used + _LEAST:
                limit, used = time.monotonic() + SECONDS, now
        hung = not self.codes and not self.wait(0)
        # A launcher ends the other ranks when one has failed: first it asks, then it kills.
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            for pid in set(self.ids) - set(self.codes):
                if number is not None:
                    os.kill(pid, number)
            if self.wait(0 if hung and number is None else _GRACE):
                break
        left = list(_living(self.ids[0]))
        limit = time.monotonic() + 5
        while left and time.monotonic() < limit:
            time.sleep(0.02)
            left = list(_living(self.ids[0]))
        if left:
            os.killpg(self.ids[0], signal.SIGKILL)
        self.reader.join(5)
        if hung:
            raise Bad("hang", f"no progress for {SECONDS:g} s, or none that ended it in {10 * SECONDS:g} s")
        if left:
            raise Bad("orphans", f"{len(left)} processes")
        return [self.codes[pid] for pid in self.ids]


def _members(group: int) -> Iterator[tuple[int, list[str]]]:
    """The processes of a group that have not ended, each with what /proc says of it from its state on."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            yield int(stat.parent.name), fields


def _living(group: int) -> Iterator[int]:
    return (pid for pid, _ in _members(group))


def _processor_seconds(group: int) -> float:
    return sum(int(fields[11]) + int(fields[12]) for _, fields in _members(group)) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------------ the processes


def start(
    run: Run,
    place: Place,
    operation: int | None = None,
    act: Callable[[], object] | None = None,
    more: Sequence[str] = (),
    prepare: Callable[[], object] | None = None,
) -> Processes:
    """Fork the processes of a run.

    operation, act: the first process calls `act` before this file operation in the output; None: it counts them.
    more: further flags.
    prepare: called in each process before the run.
    """
    port = _free_port() if run.ranks > 1 else ""
    receive, send = os.pipe()  # no file, as a limit for the size of files would be one for what is printed
    ids: list[int] = []
    for rank in range(run.ranks):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, ids[0] if ids else 0)
                os.close(receive)
                os.dup2(send, 1)
                os.dup2(send, 2)
                os.close(send)
                if prepare is not None:
                    prepare()
                code = _work(run, place, rank, port, operation, act if rank == 0 else None, more)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        ids.append(pid)
        try:
            os.setpgid(pid, ids[0])  # here too, or else a signal to the group may come first
        except ProcessLookupError:
            pass
    os.close(send)
    reader = threading.Thread(target=_keep, args=(receive, place.text), daemon=True)
    reader.start()
    return Processes(ids, reader)


def _keep(pipe: int, path: Path) -> None:
    """Write what comes through a pipe to a file, to its end."""
    with os.fdopen(pipe, "rb") as source:
        path.write_bytes(source.read())


def _work(run: Run, place: Place, rank: int, port: str, operation: int | None, act: Any, more: Sequence[str]) -> int:
    """Run a script in a process that was just forked; returns its exit code."""
    gc.freeze()
    os.chdir(ROOT)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"SCALED_ROPE_CACHE": str(place.inputs / "cache"), **run.environment}
    if run.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(run.ranks),
                       "LOCAL_WORLD_SIZE": str(run.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    from scaled_rope.command_line import run_cli

    count = _watch(str(place.out), operation, act) if rank == 0 else [0]
    script = importlib.import_module(run.module)
    if run.module == "finetune":  # which reads all recipes of configs/, a second of a processor, to find the one before
        script.starts_from = lambda recipe: None  # type: ignore[attr-defined]
    argv = [*run.argv(place.inputs, place.out), *more]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = run_cli(lambda: script.main(argv))
    except SystemExit as end:  # in which a rank ends that leaves it to another to say why
        code = int(end.code or 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end is not what is tried
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    if rank == 0 and operation is None:
        (place.folder / "operations").write_text(str(count[0]))
    return code


def _watch(prefix: str, operation: int | None, act: Any) -> list[int]:
    """Count the file operations below `prefix` in a list of one number, and call `act` before one of them."""
    mine, count, done = os.getpid(), [0], [False]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED or done[0] or os.getpid() != mine:
            return
        if not (arguments and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(prefix)):
            return
        count[0] += 1
        if operation is not None and count[0] >= operation and act is not None:
            done[0] = True
            done[0] = act() is not False  # False: it could not be done yet

    sys.addaudithook(hook)
    return count


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------- judgement


def said(place: Place) -> str:
    """All that the processes printed.

    Raises:
        Bad: a traceback.
    """
    text = place.text.read_text(errors="replace")
    if "Traceback (most recent call last)" in text or "Fatal Python error" in text:
        raise Bad("traceback", text[-6000:])
    return text


_LOST_RANK = re.compile(r"error: rank \d+ lost the connection to another process of this run")


def refusal(text: str, ranks: int = 1, start: str = "error: ") -> str:
    """The one line with which a run was refused; each rank may say it.

    Raises:
        Bad: none, or several.
    """
    lines = [line for line in text.splitlines() if line.startswith(start)]
    # Where one rank says what happened, another may say that it lost the connection to it.
    lines = [line for line in lines if _LOST_RANK.match(line) is None] or lines
    if not lines or len(set(lines)) > 1 or len(lines) > ranks:
        raise Bad("wrong code", f"exit code 2 with {len(lines)} lines: {text[-3000:]}")
    return lines[0]


@dataclass(frozen=True)
class Known:
    """Facts about a run that nothing disturbs."""

    left: dict[str, str]
    seconds: float
    """Of a processor, by each of its processes."""
    operations: int
    bytes: int


def undisturbed(name: str, place: Place) -> Known:
    """Run it twice.

    Raises:
        RuntimeError: it does not end well, or not alike.
    """
    run, found = RUNS[name], []
    for _ in range(2):
        place.clear()
        begun = start(run, place)
        codes = begun.finish()
        seconds = begun.seconds / len(begun.ids)
        if any(codes):
            raise RuntimeError(f"{name} ends with {codes}: {place.text.read_text()[-3000:]}")
        found.append(left_by(place.out))
    if found[0] != found[1]:
        differ = {path for path in found[0] | found[1] if found[0].get(path) != found[1].get(path)}
        raise RuntimeError(f"{name} leaves something else each time: {sorted(differ)}")
    size = sum(path.stat().st_size for path in place.out.rglob("*") if path.is_file())
    return Known(found[0], seconds, int((place.folder / "operations").read_text()), size)


def to_the_end(name: str, place: Place, known: Known, may_refuse: bool = False, ordered: bool = True) -> str:
    """Run it again to its end and compare; "identical", or "refused" where that is allowed.

    ordered: whether the order of result rows must be the same too.

    Raises:
        Bad: anything else.
    """
    run = RUNS[name]
    codes = start(run, place).finish()
    text = said(place)
    if may_refuse and 2 in codes and set(codes) <= {2, -signal.SIGTERM, -signal.SIGKILL, 143}:
        refusal(text, run.ranks)
        return "refused"
    if may_refuse and codes == [1]:  # one model of several could not be measured, the others were
        refusal(text, start="failed: ")
        return "refused"
    if any(codes):
        raise Bad("lost", f"{codes}: {text[-3000:]}")
    compare(place, known, ordered)
    return "identical"


def compare(place: Place, known: Known, ordered: bool = True) -> None:
    found = left_by(place.out)
    differ = [
        f"{path} ({'missing' if path not in found else 'more' if path not in known.left else 'other'})"
        for path in sorted(found.keys() | known.left.keys())
        if found.get(path) != known.left.get(path) and (ordered or path + ANY_ORDER not in known.left)
    ]
    if differ:
        raise Bad("different", ", ".join(differ)[:3000])


# ------------------------------------------------------------------------------------------------------------- faults


def kill(name: str, place: Place, known: Known, rng: random.Random) -> dict[str, Any]:
    """Kill a run once or several times, then run it to its end."""
    run, record = RUNS[name], {"signals": [], "at": [], "codes": []}
    place.clear()
    outcome = "identical"
    attempts = rng.choice((1, 1, 1, 2, 3))
    for _ in range(attempts):
        number = rng.choice(SIGNALS)
        group = number == signal.SIGINT or run.ranks > 1 and rng.random() < 0.8 or rng.random() < 0.3
        by_operation = rng.random() < 0.6
        at = rng.randint(1, max(1, known.operations)) if by_operation else rng.uniform(0, 1.05 * known.seconds)

        def act(number: int = number, group: bool = group) -> None:
            if group:
                os.killpg(os.getpgid(0), number)
            else:
                os.kill(os.getpid(), number)

        begun = start(run, place, int(at), act) if by_operation else start(run, place, 0)
        if not by_operation:
            begun.wait_for_work(at)
            begun.signal(number, group)
        codes = begun.finish()
        record["signals"].append(signal.Signals(number).name + ("" if group else " first"))
        record["at"].append(round(at, 3))
        record["codes"].append(codes)
        # Where one rank alone was hit, the other says that it lost the connection, whichever way that is said.
        text = said(place) if group or run.ranks == 1 else place.text.read_text()
        allowed = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 143}, signal.SIGINT: {130}}[number]
        if run.ranks == 1 and not set(codes) <= allowed | {0}:
            # One that was killed before, and now ends by itself with an error, does not find its way back.
            outcome = "lost" if len(record["codes"]) > 1 else "wrong code"
            raise Bad(outcome, f"{signal.Signals(number).name} and {codes}: {text[-3000:]}")
        if not any(codes):
            break
    if any(record["codes"][-1]):
        outcome = to_the_end(name, place, known)
    else:
        compare(place, known)
    record["kills"] = sum(any(codes) for codes in record["codes"])
    return record | {"outcome": outcome}


def full_disk(name: str, place: Place, known: Known, rng: random.Random) -> dict[str, Any]:
    """Give a run too little room, by a small file system or a limit for the size of files; then enough."""
    run = RUNS[name]
    place.clear()
    mounted = rng.random() < 0.6 and own_mounts()
    size = int(rng.uniform(0.02, 1.1) * known.bytes) if mounted else int(known.bytes * rng.random() ** 2)
    if mounted:
        mount(place.out, max(size, 4096))
        begun = start(run, place, 0)
    else:
        begun = start(run, place, 0, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    return _after_disk(name, place, known, begun, mounted, {"bytes": size, "by": "mount" if mounted else "limit"})


def removed(name: str, place: Place, known: Known, rng: random.Random) -> dict[str, Any]:
    """Remove what a run has written while it is at work."""
    place.clear()
    at = rng.randint(1, max(1, known.operations))

    def act() -> None:
        for path in place.out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # Rows that were removed are measured again after those that the run appended later.
    return _after_disk(name, place, known, start(RUNS[name], place, at, act), False, {"at": at}, ordered=False)


def read_only(name: str, place: Place, known: Known, rng: random.Random) -> dict[str, Any]:
    """Make the file system read-only while a run is at work."""
    if not own_mounts():
        return {"outcome": "identical", "note": "not tried: mounting is not allowed"}
    place.clear()
    mount(place.out, 2**26)
    at = rng.randint(1, max(1, known.operations))
    begun = start(RUNS[name], place, at, lambda: make_read_only(place.out))
    return _after_disk(name, place, known, begun, True, {"at": at})


def _after_disk(
    name: str, place: Place, known: Known, begun: Processes, mounted: bool, record: dict[str, Any], ordered: bool = True
) -> dict[str, Any]:
    """Judge a run that could not write, give it a good disk, and run it to its end."""
    run, codes = RUNS[name], begun.finish()
    if mounted:
        kept = place.folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(place.out, kept)
        unmount(place.out)
        shutil.rmtree(place.out)
        kept.rename(place.out)
    record["codes"] = codes
    text = said(place)
    if 2 in codes and set(codes) <= {0, 2, -signal.SIGTERM, -signal.SIGKILL, 143}:
        record["line"] = refusal(text, run.ranks)[:200]
    elif any(codes):
        raise Bad("wrong code", f"{codes}: {text[-3000:]}")
    return record | {"outcome": to_the_end(name, place, known, ordered=ordered)}


def damage(path: Path, how: str, rng: random.Random) -> bool:
    """Damage a file; whether that changed it."""
    data = path.read_bytes()
    if how in ("flip", "cut", "empty") and not data:
        return False
    if how == "flip":
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "directory":
            path.mkdir()
    return True


# ------------------------------------------------------------------------------------------------------- file systems

_NEW_NAMESPACE, _PRIVATE, _RECURSIVE, _READ_ONLY, _REMOUNT, _DETACH = 0x20000, 1 << 18, 1 << 14, 1, 32, 2


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def own_mounts() -> bool:
    """Give this process mounts that nobody else sees and that go with it; False where that is not allowed."""
    libc = _libc()
    if libc.unshare(_NEW_NAMESPACE):
        return False
    return libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None) == 0


def mount(folder: Path, size: int) -> None:
    """Put an empty file system of so many bytes there.

    Raises:
        OSError: it cannot be.
    """
    if _libc().mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={size},mode=700".encode()):
        raise OSError(ctypes.get_errno(), "mount", str(folder))


def make_read_only(folder: Path) -> bool:
    """Whether it could be done: a file that is open for writing keeps it from that."""
    return _libc().mount(b"none", str(folder).encode(), None, _REMOUNT | _READ_ONLY, None) == 0


def unmount(folder: Path) -> None:
    if _libc().umount2(str(folder).encode(), _DETACH):
        raise OSError(ctypes.get_errno() or errno.EBUSY, "umount", str(folder))


# ---------------------------------------------------------------------------------------------------------- its process


def in_own_process(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call a function in a process of its own and return its result. A `Bad` becomes a record with its outcome."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        try:
            try:
                record = work()
            except Bad as bad:
                record = {"outcome": bad.outcome, "shown": bad.shown}
            except BaseException:
                record = {"outcome": "trial failed", "shown": traceback.format_exc()}
            data = json.dumps(record).encode()
            while data:
                data = data[os.write(send, data) :]
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, Any] = json.loads(data) if data else {"outcome": "trial failed", "shown": "no record"}
    return found
