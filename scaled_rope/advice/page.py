"""The advice as rows of the project and as one HTML page."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.advice.trials import Measured
from scaled_rope.advice.verdict import Advice, Judged, position_rows
from scaled_rope.checkpoint import display_name
from scaled_rope.evaluation.controls import CONTROL, Control
from scaled_rope.evaluation.formatting import format_perplexity
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.statistics import format_share, tally
from scaled_rope.evaluation.windows import perplexity
from scaled_rope.files import write_atomic
from scaled_rope.report.contents import parts, read_report
from scaled_rope.report.html import PageSection, build_page, cell_html, note_html, rows_html
from scaled_rope.results import Row

# ---------------------------------------------------------------------------------------------------------------- rows


def result_rows(
    job: ModelJob,
    measured: Sequence[tuple[Measured, bool]],
    control: Measured,
    windows: Control,
    ends: Sequence[int],
    segment: int,
    data: Row,
    record: Row,
) -> list[Row]:
    """Rows of perplexity and of passkeys from the last round, as the project's evaluators write them.

    measured: candidates, and whether each is the scaling that the checkpoint carries. control: of the model as it is.
    """
    tokens = hashlib.sha256()
    for window in control.windows:
        tokens.update(window.tokens[: ends[-1]].tobytes())
    text = {
        **data,
        "documents": len({window.document for window in control.windows}),
        "windows": len(control.windows),
        "window_tokens": ends[-1],
        "fingerprint": tokens.hexdigest()[:16],
    }
    rows: list[Row] = []
    starts = dict(zip(ends, [0, *ends], strict=False))

    def add(one: Measured, carried: bool, cut: bool) -> None:
        scaling = one.candidate.scaling
        described = {**job.fields(), "scaling": scaling.to_dict(), "label": scaling.label, "carried": carried}
        protocol: Row = {"name": CONTROL, **windows.fields()} if cut else {"name": "truncate"}
        for end, fields in position_rows(one, ends, segment).items():
            if not cut or end > windows.window:
                cell = {"metric": "perplexity", **described, "data": text, "length": end}
                place = {"protocol": {**protocol, "bucket_start": starts[end]}}
                rows.append({**cell, **place, **fields, "provenance": record})

    for one, carried in measured:
        add(one, carried, cut=False)
        if carried:
            add(Measured(one.candidate, control.weights, control.first, control.nats, control.windows), carried, True)
        scaling = one.candidate.scaling
        for length, answers in sorted(one.answers.items()):
            asked = [
                {"depth": round(prompt.depth, 4), "distance": prompt.distance, "key": prompt.key, "right": answer.right}
                for prompt, answer in zip(one.prompts[length], answers, strict=True)
            ]
            keys = ",".join(f"{prompt.key}" for prompt in one.prompts[length])
            rows.append(
                {
                    "metric": "passkey",
                    **job.fields(),
                    "scaling": scaling.to_dict(),
                    "label": scaling.label,
                    "carried": carried,
                    "data": {"name": "hidden facts", "fingerprint": hashlib.sha256(keys.encode()).hexdigest()[:16]},
                    "protocol": {"name": "teacher-forced", "iterations": len(asked)},
                    "length": length,
                    **tally([answer.right for answer in answers]),
                    "prompts": asked,
                    "provenance": record,
                }
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------- page


def write_page(
    folder: Path, rows: Path, model: str, advice: Advice, screened: Sequence[Row], left_out: Mapping[str, str],
    commands: Sequence[str], lead: str,
) -> Path:  # fmt: skip
    """Write advice.html and its figures into `folder`; rows: the file of `result_rows`."""
    report = read_report([str(rows)])
    sections = [_answer(advice), _commands(commands)]
    sections += [_rest(screened, left_out)] if screened or left_out else []
    page = build_page(
        f"{display_name(model)}: which scaling for {advice.target} tokens?",
        lead,
        (advice.works, advice.verdict),
        [*sections, *parts(report, folder)],
    )
    path = folder / "advice.html"
    write_atomic(path, page)
    return path


def _answer(advice: Advice) -> PageSection:
    """The other sentences, and the table of the last round."""
    said = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in advice.sentences()[1:])
    header = [
        "perplexity beyond L", "against the last tokens only", "found beyond L", "at short length", "time of a pass",
        "served by",
    ]  # fmt: skip
    body = [_line(one, advice) for one in advice.judged]
    note = (
        f"L = {advice.original} tokens. Against the last tokens only: the same tokens, each read after the last "
        f"{advice.control.window - advice.control.stride} to {advice.control.window - 1} tokens by the model as it is; "
        "below 0 the text further back helps. At short length: perplexity within L against the model as it is. Time: "
        f"of a pass over {advice.target} tokens, over that of the model as it is. Intervals: 95 %."
    )
    notes = [note_html(line) for line in [note, *advice.notes]]
    return PageSection("The answer", "", [said, rows_html(header, body), *notes])


def _line(one: Judged, advice: Advice) -> str:
    bold = "best" if one is advice.use else ""
    right, n = one.right(advice.original)
    by_length = "\n".join(f"at {length}: {format_share(row)}" for length, row in one.found.items())
    by_place = "\n".join(f"to {end}: {change}" for end, change in one.buckets.items())
    cells = [
        cell_html(one.spec, format_perplexity(perplexity(one.measured.loss, 1)), bold, first=bold != ""),
        cell_html(f"{one.spec}\n{by_place}", one.total.short, bold, _interval(one.total)),
        cell_html(f"{one.spec}\n{by_length}", f"{right}/{n}" if n else "–", bold),
        cell_html(one.spec, one.short.short, bold, _interval(one.short)),
        cell_html(one.spec, "–" if one.cost is None else f"{one.cost:.2f}×", bold),
        cell_html(
            "\n".join([one.spec, *(f"{name}: {status}" for name, status in one.servers.items())]),
            f"{len(one.served_by)} of {len(one.servers)}",
            bold,
        ),
    ]
    name = f"<b>{html.escape(one.spec)}</b>" if bold else html.escape(one.spec)
    return f"<tr><th scope=row>{name}</th>{''.join(cells)}</tr>"


def _interval(change: Any) -> str:
    return str(change).removeprefix(change.short).strip()


def _commands(commands: Sequence[str]) -> PageSection:
    blocks = "".join(f"<pre>{html.escape(command)}</pre>" for command in commands)
    return PageSection("Commands", "", [blocks])


def _rest(screened: Sequence[Row], left_out: Mapping[str, str]) -> PageSection:
    """Tables of the earlier rounds, and a list of the rest, which was not measured."""
    lines = []
    for one in screened:
        found = one["retrieval"]
        cells = [str(one["windows"]), format_perplexity(one["perplexity_beyond"])]
        cells.append(f"{found['right']}/{found['n']}" if found else "–")
        cells_html = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr><th scope=row>{html.escape(one['spec'])}</th>{cells_html}</tr>")
    body = [rows_html(["windows", "perplexity beyond L", "found beyond L"], lines)] if lines else []
    body += [note_html(f"{spec}: {why}") for spec, why in left_out.items()]
    note = "Measured in earlier rounds on other windows and prompts, too few to compare with the table above."
    return PageSection("Also tried", note if lines else "", body)
