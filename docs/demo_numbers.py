"""Write the demo's numbers into README.md and docs/demo.md, and its picture, from the committed rows.

python docs/demo_numbers.py            # after data/demo_rows.jsonl was replaced
python docs/demo_numbers.py --check    # exit code 1 when a page or the picture shows other rows
"""

from __future__ import annotations

import hashlib
import io
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from scaled_rope.command_line import run_cli
from scaled_rope.files import write_atomic
from scaled_rope.report.context_use import control_table
from scaled_rope.report.demo_opening import demo_opening
from scaled_rope.report.figures import perplexity_figure
from scaled_rope.report.page_blocks import only_check, with_block
from scaled_rope.report.summary import Said
from scaled_rope.report.tables import Cell, ReportRows, Section, Table, load_results, tables_of
from scaled_rope.report.verdict import Verdict, demo_verdict
from scaled_rope.texts.corpora import STANDIN, STANDINS

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "data" / "demo_rows.jsonl"
PICTURE = ROOT / "docs" / "images" / "demo.png"
BASE, TUNED = "models/tiny-llama-256", "out/demo/model"
BEGIN, END = "<!-- demo: python docs/demo_numbers.py -->\n", "<!-- end of demo -->\n"
TEXTS = {
    "novel": "a novel that none of these models was trained on",
    "bible": "three books of the King James Bible that none of these models was trained on",
}


def text_name(section: Section) -> str:
    """The text of a section in words."""
    name = section.topic.data
    standin = STANDINS.get(name.removeprefix(STANDIN))
    return TEXTS.get(name) or (f"{name} ({standin.note})" if standin else name)


def grid(heads: list[str], lines: Mapping[str, list[str]]) -> str:
    """A table in Markdown."""
    rows = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    rows += [f"| {' | '.join([name, *cells])} |" for name, cells in lines.items()]
    return "".join(f"{row}\n".replace("|  |", "| |") for row in rows)


def number(cell: Cell) -> str:
    """A perplexity with one digit behind the point; where there is none, what the report shows."""
    return cell.text if cell.value is None else f"{cell.value:.1f}"


def perplexities(section: Section, verdict: Verdict) -> str:
    """The table by position bucket; controls are left to their own."""
    table = tables_of(section)[0]
    heads = [span if span.startswith("0-") else f"–{span.partition('-')[2]}" for span in table.columns]
    lines = {
        f"**{series.name}**" if series is verdict.tuned else series.name: [number(cell) for cell in cells]
        for series, cells in table.lines
        if not series.aside
    }
    return grid([head.replace("-", "–") for head in heads], lines)


def controls(table: Table) -> str:
    lines = {series.name: [cell.text for cell in cells] for series, cells in table.lines}
    return grid([head.replace("-", "–") for head in table.columns], lines)


def keys(opening_lines: Mapping[str, list[Said]], lengths: list[str]) -> str:
    """Passkeys and needles of the base and of the extended model."""
    found = {name: [said.text for said in answers] for name, answers in opening_lines.items() if " found, " in name}
    return grid(lengths, found)


def origin(results: ReportRows, where: str) -> str:
    """How the rows were made."""
    rows = [row for row in results.rows if row["metric"] == "perplexity"]
    record, data = rows[-1]["provenance"], rows[-1]["data"]
    windows = f"{data['windows']} windows of {data['window_tokens']} tokens, {rows[-1]['dtype']}; "
    made = f"made by `make demo` at commit {(record['commit'] or 'unknown')[:7]} on {record['cpu_count']} cores of an "
    return f"{windows}[data/demo_rows.jsonl]({where}), {made}{record['device']}."


def blocks(rows: Path = ROWS) -> dict[str, str]:
    """Page -> what stands between its marks."""
    results = load_results([str(rows)], TUNED)
    verdict = demo_verdict(results, BASE, TUNED)
    opening = demo_opening(results, verdict)
    sections = [one for one in results.of("perplexity") if verdict.tuned in one.rows]
    column = "Each column covers another part of the text, so compare within a column."
    found = keys(opening.lines, opening.models)
    first = sections[0]

    def readme() -> Iterator[str]:
        yield opening.sentence
        yield f"Perplexity by position on {text_name(first)}:"
        yield perplexities(first, verdict)
        yield f"{column} {origin(results, 'data/demo_rows.jsonl')}"
        if found:
            yield f"Passkeys found, by prompt length in tokens; extended: {verdict.tuned.name}."
            yield found

    def page() -> Iterator[str]:
        yield opening.sentence
        yield f"{column} {origin(results, '../data/demo_rows.jsonl')}"
        for section in sections:
            yield f"Perplexity by position on {text_name(section)}:"
            yield perplexities(section, verdict)
            if (table := control_table(section)) is not None:
                yield f"Change of perplexity against the last {verdict.trained} tokens only, on the same text:"
                yield controls(table)
        if found:
            yield f"Keys found, by prompt length in tokens; extended: {verdict.tuned.name}."
            yield found
        for section in results.of("passkey"):
            (table,) = tables_of(section)
            asked = f", of {table.lines[0][1][0].text.partition('/')[2]} for each length"
            yield f"{table.heading if section.topic.setting('wording') else 'Passkeys found'}{asked}:"
            yield grid(table.columns, {series.name: [cell.text for cell in cells] for series, cells in table.lines})

    return {"README.md": join(readme()), "docs/demo.md": join(page())}


def join(parts: Iterator[str]) -> str:
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def with_numbers(page: str, block: str, name: str) -> str:
    """The page with the block between its marks."""
    return with_block(page, BEGIN, END, f"\n{block}\n", name)


def digest(rows: Path = ROWS) -> str:
    """A short hash of the rows, which the picture carries."""
    return hashlib.sha256(rows.read_bytes()).hexdigest()[:16]


def picture(rows: Path = ROWS) -> bytes:
    """The perplexity figure of the first text, with the hash of its rows."""
    results = load_results([str(rows)], TUNED)
    (section, *_) = results.of("perplexity")
    figure = perplexity_figure(section, "demo", {series: "" for series in results.series})
    assert figure is not None
    with tempfile.TemporaryDirectory() as folder:
        figure.render(Path(folder))
        image = Image.open(Path(folder) / "demo.png")
        image.load()
    note, data = PngInfo(), io.BytesIO()
    note.add_text("Rows", digest(rows))
    image.save(data, "png", pnginfo=note, optimize=True)
    return data.getvalue()


def stale() -> list[str]:
    """The files that show other rows than the committed ones."""
    found = []
    for name, block in blocks().items():
        page = (ROOT / name).read_text(encoding="utf-8")
        if with_numbers(page, block, name) != page:
            found.append(name)
    with Image.open(PICTURE) as image:
        if getattr(image, "text", {}).get("Rows") != digest():
            found.append(str(PICTURE.relative_to(ROOT)))
    return found


def main() -> int:
    if only_check("docs/demo_numbers.py", __doc__):
        for name in (found := stale()):
            print(f"{name} shows other rows than {ROWS.relative_to(ROOT)}; run python docs/demo_numbers.py")
        return int(bool(found))
    for name, block in blocks().items():
        page = (ROOT / name).read_text(encoding="utf-8")
        write_atomic(ROOT / name, with_numbers(page, block, name))
    write_atomic(PICTURE, picture())
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
