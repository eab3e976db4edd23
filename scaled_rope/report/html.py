"""One HTML page for a report: it needs no other file and no network, fits a phone, and follows light and dark mode.

Every number is a cell or a point with `data-tip`, a text that is shown on hovering, tapping or focusing.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scaled_rope.report.figures import GREY, PALETTE, Figure, css_color
from scaled_rope.report.paper import SIGNS, PaperCell, PaperTable
from scaled_rope.report.summary import Summary
from scaled_rope.report.tables import Cell, Table, about, title_of
from scaled_rope.results import Row


def _variables(theme: int) -> str:
    colors = [f"--c{index}:{pair[theme]}" for index, pair in enumerate(PALETTE)]
    return ";".join([f"--grey:{GREY[theme]}", *colors])


_STYLE = f"""
:root {{ color-scheme: light dark; --ink: #1b1c1f; --soft: #62646b; --line: #dcdde2; --paper: #fff; --card: #f5f6f8;
  --good: #00795a; --bad: #b8450b; --tint: 0, 114, 178; {_variables(0)}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e9e9ec; --soft: #a3a5ad; --line: #37393f; --paper: #141518;
  --card: #1d1f23; --good: #3fd0a5; --bad: #ff9a57; --tint: 95, 180, 236; {_variables(1)}; }} }}
"""
_STYLE += """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 6rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0; } h3 { font-size: .95rem; margin: 1.75rem 0 .1rem; }
section { margin-top: 2rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
p { margin: .25rem 0 .75rem; } .note, figcaption { color: var(--soft); font-size: .84rem; line-height: 1.45; }
nav { display: flex; flex-wrap: wrap; gap: .35rem .9rem; font-size: .84rem; margin-top: .75rem; }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--soft); }
.verdict { border: 2px solid var(--tone); border-radius: .5rem; padding: .75rem 1rem; margin-top: 1rem; }
.verdict b { color: var(--tone); }
figure { margin: .75rem 0 0; } svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg text { font-family: inherit; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; margin: .5rem 0 0; padding: 0; }
.legend button { display: inline-flex; align-items: center; padding: .2rem .55rem .2rem .4rem; cursor: pointer;
  font: inherit; font-size: .8rem; text-align: left; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: 1rem; }
.legend button:hover, .legend [aria-pressed=true] { border-color: var(--ink); }
.key { display: inline-block; flex: none; width: 1.7em; height: .9em; vertical-align: -.1em; margin-right: .35em; }
.who { display: flex; align-items: center; }
.some [data-s]:not(.on) { opacity: .13; }
.scroll { overflow-x: auto; margin: .4rem -1rem 0; padding-right: 1rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .34rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; padding-left: 1rem; background: var(--paper);
  font-weight: 500; z-index: 1; }
thead th { color: var(--soft); font-weight: normal; vertical-align: bottom; }
thead th.long { white-space: normal; min-width: 6.5rem; }
tbody th { max-width: 9.5rem; white-space: normal; line-height: 1.25; }
td[data-tip] { cursor: help; background: rgba(var(--tint), calc(var(--share, 0) * .32)); }
td[data-tip]:hover, td:focus-visible { outline: 2px solid var(--c0); outline-offset: -2px; }
td.best { font-weight: 700; } td small { display: block; color: var(--soft); font-size: .74rem; font-weight: 400; }
td.muted { color: var(--soft); }
.summary { margin-top: 1rem; } .summary > p:first-child { font-size: 1.05rem; }
.summary th, .summary td { white-space: normal; text-align: left; vertical-align: top; min-width: 7.5rem; }
.narrow td, .narrow thead th { white-space: nowrap; min-width: 0; } .narrow th:first-child { white-space: normal; }
.summary .note { margin: .25rem 0 0; }
.summary .note:first-of-type { margin-top: .6rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.unsure { color: var(--soft); font-weight: 600; }
.reproduced { color: var(--good); } .differs { color: var(--bad); } .not-run { color: var(--soft); }
td.status { font-weight: 600; text-align: left; } td.not-run { font-weight: 400; }
#tip { position: fixed; z-index: 9; max-width: min(30rem, calc(100vw - 2rem)); padding: .6rem .8rem;
  border-radius: .5rem; background: var(--card); border: 1px solid var(--line);
  box-shadow: 0 .4rem 1.4rem rgba(0, 0, 0, .25); font-size: .8rem; line-height: 1.4; white-space: pre-line;
  overflow-wrap: anywhere; pointer-events: none; }
#tip[hidden] { display: none; } #tip::first-line { font-weight: 700; }
#ring { position: fixed; width: 14px; height: 14px; margin: -7px; border: 2px solid var(--ink); border-radius: 50%;
  pointer-events: none; z-index: 8; } #ring[hidden] { display: none; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--card); border-radius: .5rem;
  padding: .7rem .9rem; font-size: .78rem; }
details { margin-top: 1.5rem; } summary { cursor: pointer; font-size: .95rem; font-weight: 700; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; font-size: .84rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (min-width: 56rem) {
  body { padding: 2rem 2rem 6rem; } h1 { font-size: 2rem; }
  .pair { display: grid; grid-template-columns: minmax(0, 36rem) minmax(0, 1fr); gap: 0 2.5rem; align-items: start; }
  .pair .legend { flex-direction: column; align-items: flex-start; }
  .scroll { margin: .4rem 0 0; } th:first-child { padding-left: 0; } tbody th { max-width: 20rem; }
}
@media (max-width: 40rem) {
  #tip { left: .5rem !important; right: .5rem; bottom: .5rem; top: auto !important; max-width: none; max-height: 48vh;
    overflow: hidden; }
  #tip.up { top: .5rem !important; bottom: auto; }
  tbody th { min-width: 6.8rem; } th, td { padding: .34rem .4rem; }
  .narrow table { font-size: .75rem; } .narrow small { font-size: .62rem; }
  .narrow th, .narrow td { padding: .3rem .22rem; }
  .narrow th:first-child { min-width: 5.4rem; max-width: 5.4rem; padding-left: 1rem; }
}
@media print { #tip, #ring, nav { display: none; } section { break-inside: avoid; } }
"""

_SCRIPT = """
const tip = document.getElementById('tip'), ring = document.getElementById('ring');
const centre = e => { const b = (e.querySelector('use') || e).getBoundingClientRect();
  return [b.left + b.width / 2, b.top + b.height / 2]; };
function show(e) {
  const cell = e.tagName === 'TD', box = e.getBoundingClientRect(), [x, y] = cell ? [box.left, box.bottom] : centre(e);
  tip.textContent = e.dataset.tip; tip.hidden = false; ring.hidden = cell;
  if (!cell) { ring.style.left = x + 'px'; ring.style.top = y + 'px'; }
  tip.classList.toggle('up', y > innerHeight / 2);  // on a phone, where it is as wide as the page
  tip.style.left = Math.max(8, Math.min(x, innerWidth - tip.offsetWidth - 16)) + 'px';
  const below = y + 12, above = (cell ? box.top : y) - tip.offsetHeight - 12;
  tip.style.top = (below + tip.offsetHeight < innerHeight || above < 0 ? below : above) + 'px';
}
function hide() { tip.hidden = ring.hidden = true; }
for (const svg of document.querySelectorAll('figure svg')) {
  const points = [...svg.querySelectorAll('[data-tip]')];
  if (!points.length) continue;
  const near = event => {
    let best = null, least = 26;
    for (const p of points) {
      if (svg.classList.contains('some') && !p.classList.contains('on')) continue;
      const [x, y] = centre(p), d = Math.hypot(x - event.clientX, y - event.clientY);
      if (d < least) [best, least] = [p, d];
    }
    best ? show(best) : hide();
  };
  svg.addEventListener('pointermove', near); svg.addEventListener('pointerdown', near);
  svg.addEventListener('pointerleave', event => event.pointerType === 'mouse' && hide());
}
for (const table of document.querySelectorAll('table')) {
  const cell = event => event.target.closest('td[data-tip]');
  table.addEventListener('pointerover', event => cell(event) ? show(cell(event)) : hide());
  table.addEventListener('pointerleave', event => event.pointerType === 'mouse' && hide());
  table.addEventListener('focusin', event => cell(event) && show(cell(event)));
  table.addEventListener('focusout', hide);
  table.addEventListener('keydown', event => {
    const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
    const td = cell(event), step = steps[event.key];
    if (!td || !step) return;
    const row = table.rows[td.parentNode.rowIndex + step[0]], next = row && row.cells[td.cellIndex + step[1]];
    if (next && next.dataset.tip) {
      td.tabIndex = -1; next.tabIndex = 0; next.focus(); event.preventDefault(); }
  });
}
addEventListener('keydown', event => event.key === 'Escape' && hide());
addEventListener('scroll', () => {  // a cell that the keyboard brought into view keeps its tip
  const active = document.activeElement;
  active.dataset.tip && !tip.hidden ? show(active) : hide();
}, {passive: true});
addEventListener('pointerdown', event => event.target.closest('[data-tip], svg') || hide());
for (const legend of document.querySelectorAll('.legend')) {
  const svg = legend.closest('.pair').querySelector('svg'), buttons = [...legend.querySelectorAll('button')];
  const paint = keys => {
    svg.classList.toggle('some', keys.size > 0);
    svg.querySelectorAll('[data-s]').forEach(e => e.classList.toggle('on', keys.has(e.dataset.s)));
  };
  const pressed = () => new Set(buttons.filter(b => b.ariaPressed === 'true').map(b => b.dataset.key));
  for (const button of buttons) {
    button.addEventListener('click', () => {
      button.ariaPressed = String(button.ariaPressed !== 'true'); paint(pressed()); });
    button.addEventListener('pointerenter', event => event.pointerType === 'mouse' &&
      paint(new Set([...pressed(), button.dataset.key])));
    button.addEventListener('pointerleave', () => paint(pressed()));
  }
}
"""

# The markers of matplotlib that series use, around (0, 0).
_SHAPES = {
    "o": "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
    "s": "M-3,-3h6v6h-6z",
    "D": "M0,-3.8L3.8,0L0,3.8L-3.8,0z",
    "^": "M0,-3.5L3.4,3H-3.4z",
    "v": "M0,3.5L3.4,-3H-3.4z",
    "P": "M-1.2,-3.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3z",
    "X": "M-3.5,-2L-2,-3.5L0,-1.5L2,-3.5L3.5,-2L1.5,0L3.5,2L2,3.5L0,1.5L-2,3.5L-3.5,2L-1.5,0z",
    "*": "M0,-4.2L1.1,-1.3L4,-1.3L1.7,.6L2.5,3.6L0,1.8L-2.5,3.6L-1.7,.6L-4,-1.3L-1.1,-1.3z",
}


def _swatch(color: int, marker: str, dashed: bool, thick: bool) -> str:
    """A short piece of a curve, drawn as in the figures, for legends and tables."""
    dash = " stroke-dasharray='4 2'" if dashed else ""
    fill = "var(--paper)" if dashed else css_color(color)
    shape = f"<path d='{_SHAPES[marker]}' fill='{fill}' stroke='{css_color(color)}'/>" if marker else ""
    return (
        f"<svg class=key viewBox='-10 -5 20 10' aria-hidden=true><path d='M-10,0H10' fill=none "
        f"stroke='{css_color(color)}' stroke-width={2.4 if thick else 1.5}{dash} />{shape}</svg>"
    )


def figure_html(figure: Figure, folder: Path) -> str:
    """A figure with its legend, whose entries highlight curves; its PNG and PDF are written into `folder`."""
    chips = "".join(
        f"<button type=button aria-pressed=false data-key={curve.key}>"
        f"{_swatch(curve.color, curve.marker, curve.dashed, curve.width > 2)}{html.escape(curve.name)}</button>"
        for curve in figure.legend
    )
    chips = f"<div class=legend role=group aria-label='curves to show'>{chips}</div>" if chips else ""
    picture = (
        f'<figure role=img aria-label="{html.escape(figure.heading)}">{figure.render(folder)}'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )
    return f"<div class=pair>{picture}{chips}</div>"


def cell_html(
    tip: str, text: str, kind: str = "", small: str = "", share: float | None = None, first: bool = False
) -> str:
    """A table cell with a text that is shown on hovering. share: how dark, from 0 to 1; first: found by the tab key."""
    shade = "" if share is None else f' style="--share:{share:.2f}"'
    classes = f' class="{kind}"' if kind else ""
    below = f"<small>{html.escape(small)}</small>" if small else ""
    index = 0 if first else -1
    return f'<td{classes}{shade} tabindex={index} data-tip="{html.escape(tip)}">{html.escape(text)}{below}</td>'


def rows_html(header: Sequence[str], body: Sequence[str], corner: str = "") -> str:
    """A table with these column headings, after one for the rows' names, and rows of HTML."""
    heads = "".join(
        f"<th scope=col{' class=long' if len(text) > 16 else ''}>{html.escape(text)}</th>" for text in (corner, *header)
    )
    return f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def table_html(table: Table, folded: bool = False) -> str:
    """A table of measured numbers, the best of each column in bold; `folded` shows its heading only, until opened."""
    body, first = [], True
    whiskers = not table.section.topic.by_length
    for series, cells in table.lines:
        drawn = _swatch(series.color, series.marker, series.dashed, series.tuned)
        line = f"<th scope=row><span class=who>{drawn}<span>{html.escape(series.name)}</span></span></th>"
        for column, cell, best in zip(table.columns, cells, table.best, strict=True):
            if cell.row is None:
                line += "<td></td>"
                continue
            kind = "muted" if cell.row.get("error") else "best" if cell.text in best else ""
            tip = about(series.full_name, cell, f"{table.title}, {column}")
            small = f"{cell.interval[0]:.1f}–{cell.interval[1]:.1f}" if whiskers and cell.interval else ""
            shade = cell.share if table.section.topic.by_length else None
            line += cell_html(tip, cell.marked, kind, small, shade, first)
            first = False
        body.append(f"<tr>{line}</tr>")
    inner = f"<p class=note>{html.escape(' '.join([table.note, *table.told]))}</p>{rows_html(table.columns, body)}"
    if folded:
        return f"<details><summary>{html.escape(table.heading)}</summary>{inner}</details>"
    # A table with the heading of its part needs none of its own.
    return inner if table.heading == title_of(table.section) else f"<h3>{html.escape(table.heading)}</h3>{inner}"


def summary_html(summary: Summary) -> str:
    """The sentence and the table at the top of the page. Tones have words too: color is not all that tells."""
    body = []
    for question, answers in summary.lines.items():
        cells = "".join(
            f"<td{f' class={said.tone}' if said.tone else ''}>{html.escape(said.text)}"
            f"{f'<small>{html.escape(said.more)}</small>' if said.more else ''}</td>"
            for said in answers
        )
        body.append(f"<tr><th scope=row>{html.escape(question)}</th>{cells}</tr>")
    return (
        f"<div class='summary{' narrow' if summary.corner else ''}'><p>{html.escape(summary.sentence)}</p>"
        f"{rows_html(summary.models, body, summary.corner)}"
        f"{''.join(note_html(line) for line in summary.note.splitlines())}</div>"
    )


def summary_part(summary: Summary) -> PageSection:
    """The summary as a part of a page that opens with something else."""
    return PageSection("To which length each model works", "", [summary_html(summary)])


def paper_table_html(table: PaperTable) -> str:
    """A table of the paper: each cell has our number above the published one; the last column is the verdict."""
    body, first = [], True
    for label, cells in table.lines:
        line = f"<th scope=row>{html.escape(label)}</th>"
        for column, cell in zip(table.columns, cells, strict=True):
            if cell.row is None and cell.published is None:
                line += "<td></td>"
                continue
            kind = cell.status.replace(" ", "-") if cell.published is not None else "not-run"
            ours = f"{cell.ours} {SIGNS[cell.status]}" if cell.row else "–"
            line += cell_html(_paper_tip(table, label, column, cell), ours, kind, f"paper {cell.printed}", None, first)
            first = False
        status, words = table.verdict(cells)
        body.append(f"<tr>{line}<td class='status {status.replace(' ', '-')}'>{words}</td></tr>")
    counts = ", ".join(f"{count} {status}" for status, count in table.counts.items())
    note = f"{counts}. = reproduced: within {table.tolerance:g} of the paper; ! differs; – not run. {table.note}"
    columns = [*table.columns, "status"]
    return f"<h3>{html.escape(table.title)}</h3><p class=note>{html.escape(note)}</p>{rows_html(columns, body)}"


def _paper_tip(table: PaperTable, label: str, column: str, cell: PaperCell) -> str:
    if cell.row is None:
        name = table.name if table.name.startswith("figure") else f"table{table.name}"
        return f"{label}, {column}\npublished: {cell.printed}; not run here\n./eval.sh {name}"
    what = f"published {cell.printed}, tolerance {table.tolerance:g}: {cell.status}\nmeasured"
    bounds = cell.row.get("interval") if table.name != "5" else None
    interval = (bounds[0], bounds[1]) if bounds and None not in bounds else None
    return about(f"{label}, {column}", Cell(cell.ours, cell.row, cell.measured, interval), what)


@dataclass
class PageSection:
    """One part of the page."""

    heading: str
    note: str = ""
    body: list[str] = field(default_factory=list)


def note_html(text: str) -> str:
    """A remark on the rows, as a paragraph."""
    return f"<p class=note>{html.escape(text)}</p>"


def provenance_html(rows: Sequence[Row]) -> str:
    """The provenance of all rows together: models, code, machine, versions, dates, seeds and commands."""
    records = [row["provenance"] for row in rows]
    dates = sorted(record["date"] for record in records)
    versions = dict.fromkeys(f"{name} {v}" for record in records for name, v in record["versions"].items() if v)
    facts: Mapping[str, str] = {
        "models": ", ".join(dict.fromkeys(f"{row['model']} ({row['model_fingerprint']})" for row in rows)),
        "code": ", ".join(dict.fromkeys(record["commit"] or "not under version control" for record in records)),
        "machine": ", ".join(dict.fromkeys(f"{record['device']}, {record['cpu_count']} CPUs" for record in records)),
        "versions": ", ".join(versions),
        "measured": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "seeds": ", ".join(dict.fromkeys(str(r["seed"]) for r in records if r["seed"] is not None)) or "nothing drawn",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())
    commands = list(dict.fromkeys(record["command"] for record in records))
    blocks = "".join(f"<pre>{html.escape(command)}</pre>" for command in commands)
    count = f"{len(commands)} command{'s' if len(commands) != 1 else ''}"
    return f"<dl>{items}</dl><details><summary>{count}</summary>{blocks}</details>"


def content_policy(script: str) -> str:
    """The element that forbids a page everything but its own styles, pictures within it and this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f'<meta http-equiv=Content-Security-Policy content="{rules}">'


def build_page(
    title: str,
    lead: str,
    verdict: tuple[bool, str] | None,
    parts: Sequence[PageSection],
    summary: Summary | None = None,
) -> str:
    """The whole page.

    Args:
        verdict: whether a claim holds, and "PASS: why", "FAIL: why" or "UNDECIDED: why".
        summary: what the page opens with.
    """
    box = "" if summary is None else summary_html(summary)
    if verdict is not None:
        holds, line = verdict
        word, why = line.split(": ", 1)
        tone = "good" if holds else "bad"
        box += f'<p class=verdict style="--tone:var(--{tone})"><b>{word}</b>: {html.escape(why)}</p>'
    links = "".join(f'<a href="#s{index}">{html.escape(part.heading)}</a>' for index, part in enumerate(parts))
    sections = "".join(
        f"<section id=s{index}><h2>{html.escape(part.heading)}</h2>"
        f"{f'<p class=note>{html.escape(part.note)}</p>' if part.note else ''}{''.join(part.body)}</section>"
        for index, part in enumerate(parts)
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>{content_policy(_SCRIPT)}"
        "<meta name=viewport content='width=device-width, "
        f"initial-scale=1'><title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p class=note>{html.escape(lead)}</p>{box}<nav aria-label=parts>{links}</nav>{sections}"
        f"<div id=tip role=status hidden></div><div id=ring hidden></div><script>{_SCRIPT}</script></html>\n"
    )
