"""The certificate as one HTML page: the verdict, the differences by position, and all candidates."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaled_rope.certificate.certify import Certificate
from scaled_rope.files import write_atomic
from scaled_rope.report.html import PageSection, build_page, cell_html, note_html, rows_html

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 640, 312, 74, 24, 38, 12
_LEAST = 1e-6
"""Nats; smaller differences are drawn here."""


def write_page(path: Path, certificate: Certificate, model: str) -> None:
    """Write the page; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page(certificate, model))


def page(certificate: Certificate, model: str) -> str:
    """The whole page as text."""
    word = {"right": "RIGHT", "other": "OTHER SCALING"}.get(certificate.verdict, "UNCLEAR")
    line = f"{word}: {certificate.sentence.removeprefix('unclear: ')}"
    dtype = f"By its prompts of one token it computes in {certificate.dtype}: {certificate.single:.1e} nats off."
    return build_page(
        f"Served scaling of {Path(model).name}",
        f"Claimed: {certificate.claim}. Asked: {certificate.served_by}. {dtype}",
        (certificate.verdict == "right", line),
        [
            PageSection("Differences by position", _CAPTION, [_figure(certificate)]),
            PageSection(
                "By length",
                "Differences of log-probabilities in nats, root mean square." + _nearest(certificate),
                [_lengths(certificate)],
            ),
            PageSection(
                "Candidates",
                "What the server may compute. The ratio is ln of how much likelier the best candidate makes what was "
                "observed; one that is excluded is not tried at longer prompts.",
                [_candidates(certificate), *map(note_html, certificate.notes)],
            ),
        ],
    )


_CAPTION = (
    "Each point is a position of a prompt: the root mean square difference between the log-probabilities of the server "
    "and those of the reference. The band is the noise that no scaling makes."
)


def _nearest(certificate: Certificate) -> str:
    """Which candidate the column of the nearest other is about."""
    other = certificate.lengths[-1].other
    return f" The nearest other is {other}." if other else ""


def _figure(certificate: Certificate) -> str:
    rows = certificate.positions
    noise = {row.length: row.noise for row in certificate.lengths}
    values = [value for *_, one, other in rows for value in (one, other) if not math.isnan(value)]
    low = math.floor(math.log10(max(_LEAST, min([*values, *noise.values()]))))
    high = max(low + 1, math.ceil(math.log10(max([*values, *noise.values(), _LEAST]))))
    longest = max(noise)

    def x(position: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * position / longest

    def y(value: float) -> float:
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * share

    other = certificate.lengths[-1].other
    parts = list(_axes(low, high, longest, x, y))
    bottom = y(10.0**low)
    level = y(max(noise.values()))
    parts.append(
        f'<rect x={x(0):.1f} y={level:.1f} width={x(longest) - x(0):.1f} height={max(0.0, bottom - level):.1f} '
        'fill="var(--grey)" opacity=.18 />'
    )  # fmt: skip
    for length, position, one, second in rows:
        for value, color, name, shape in ((second, 1, other, "square"), (one, 0, certificate.claim, "circle")):
            if math.isnan(value):
                continue
            tip = html.escape(f"{name}\nprompt of {length} tokens, position {position}\n{value:.2e} nats")
            at = (x(position), y(value))
            mark = (
                f'<circle cx={at[0]:.1f} cy={at[1]:.1f} r=3 fill="var(--c{color})" data-tip="{tip}" />'
                if shape == "circle"
                else f'<rect x={at[0] - 2.6:.1f} y={at[1] - 2.6:.1f} width=5.2 height=5.2 fill=none '
                f'stroke="var(--c{color})" data-tip="{tip}" />'
            )  # fmt: skip
            parts.append(mark)
    legend = (
        f"<p class=note><span style='color:var(--c0)'>●</span> {html.escape(certificate.claim)}, as claimed &emsp; "
        f"<span style='color:var(--c1)'>□</span> {html.escape(other or 'no other candidate')} &emsp; "
        "<span style='background:var(--grey);opacity:.4'>&emsp;</span> noise</p>"
    )
    label = "Differences of log-probabilities by position"
    return (
        f'<figure role=img aria-label="{label}"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size=11>'
        f"{''.join(parts)}</svg></figure>{legend}"
    )


def _axes(low: int, high: int, longest: int, x: object, y: object) -> Iterator[str]:
    assert callable(x) and callable(y)
    for power in range(low, high + 1):
        at = y(10.0**power)
        yield f'<path d="M{x(0):.1f},{at:.1f}H{x(longest):.1f}" stroke="var(--line)" />'
        yield f"<text x={_LEFT - 6} y={at + 4:.1f} text-anchor=end fill=currentColor>{10.0**power:g}</text>"
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = x(share * longest)
        yield f"<text x={at:.1f} y={_HEIGHT - 22} text-anchor=middle fill=currentColor>{round(share * longest)}</text>"
    middle = f"x={(x(0) + x(longest)) / 2:.0f} y={_HEIGHT - 4} text-anchor=middle fill=currentColor"
    yield f"<text {middle}>position in the prompt, tokens</text>"
    place = (12, (y(10.0**low) + y(10.0**high)) / 2)
    turned = f'x={place[0]} y={place[1]:.0f} transform="rotate(-90 {place[0]} {place[1]:.0f})"'
    yield f"<text {turned} text-anchor=middle fill=currentColor>difference, nats</text>"


def _lengths(certificate: Certificate) -> str:
    body = []
    for row in certificate.lengths:
        other = "not tried" if math.isnan(row.other_difference) else f"{row.other_difference:.1e}"
        tip = (
            f"prompts of {row.length} tokens\n{row.positions} positions, worst difference {row.claimed_worst:.2e} nats"
        )
        cells = "".join(
            cell_html(tip, text)
            for text in (
                f"{row.positions}",
                f"{row.noise:.1e}",
                f"{row.claimed:.1e}",
                f"{row.claimed_worst:.1e}",
                other,
            )
        )
        body.append(f"<tr><th scope=row>{row.length} tokens</th>{cells}</tr>")
    return rows_html(["positions", "noise", "off as claimed", "worst", "nearest other"], body)


def _candidates(certificate: Certificate) -> str:
    body = []
    for row in certificate.candidates:
        tip = f"{row.name}\ntried at {', '.join(map(str, row.lengths))} tokens"
        texts: Sequence[str] = (f"{row.difference:.1e}", f"{row.worst:.1e}", f"{row.log_ratio:.3g}", row.state)
        kinds = ("", "", "", "best" if row.state == "best" else "muted" if row.state == "excluded" else "")
        cells = "".join(cell_html(tip, text, kind) for text, kind in zip(texts, kinds, strict=True))
        body.append(f"<tr><th scope=row>{html.escape(', or '.join((row.name, *row.also)))}</th>{cells}</tr>")
    return rows_html(["off, nats", "worst", "ln ratio", ""], body)
