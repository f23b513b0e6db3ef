"""Reports as text: tables, timelines and trees. Draws what it is given and computes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from . import Report, Step, Table

WIDTH = 100


class Span(msgspec.Struct, frozen=True):
    """From ``start`` to ``end`` on a timeline, drawn with the letter ``mark``."""

    start: int
    end: int
    mark: str


class Node(msgspec.Struct, frozen=True):
    """Of a tree."""

    text: str
    children: tuple[Node, ...] = ()


def report(told: Report, *, steps: int = 60) -> Iterator[str]:
    """A report as lines; of a long trace the first ``steps``."""
    yield from textwrap.wrap(told.question, WIDTH)
    if shown := told.steps[:steps]:
        yield ""
        yield from trace(shown)
    if len(told.steps) > steps:
        yield f"… and {len(told.steps) - steps} steps more (--steps)"
    for drawing in told.drawings:
        yield from ("", drawing.title, "")
        yield from drawing.lines
    for one in told.tables:
        yield ""
        yield from table(one)
    if told.conclusions:
        yield ""
    for conclusion in told.conclusions:
        yield from textwrap.wrap(conclusion, WIDTH, initial_indent="• ", subsequent_indent="  ")
    if told.page:
        yield from ("", f"More: {told.page}")


def trace(steps: Sequence[Step]) -> Iterator[str]:
    who = max(len(step.who) for step in steps)
    times = [str(step.time) if step.time is not None else "" for step in steps]
    time = max(map(len, times))
    for step, at in zip(steps, times, strict=True):
        head = f"{at:>{time}}  {step.who:<{who}}  " if time else f"{step.who:<{who}}  "
        yield from textwrap.wrap(
            step.what, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
        )


def table(told: Table) -> Iterator[str]:
    """Numbers and bounds (≤ 3) to the right, words to the left; None is a dash."""
    cells = [tuple(_cell(value) for value in row) for row in told.rows]
    columns = list(zip(told.columns, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(row[at]) for row in told.rows) for at in range(len(told.columns))]
    yield told.title
    for row in (told.columns, *cells):
        yield "  ".join(
            f"{text:>{width}}" if right else f"{text:<{width}}"
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
    yield from textwrap.wrap(told.note, WIDTH)


def _is_number(value: str | int | float | None) -> bool:
    return value.startswith("≤ ") if isinstance(value, str) else True


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else value


def timeline(lanes: Mapping[str, Iterable[Span]], *, width: int = 80) -> Iterator[str]:
    """One lane a row, one column a slice of time; what fills most of a column is drawn."""
    spans = {name: list(lane) for name, lane in lanes.items()}
    end = max((span.end for lane in spans.values() for span in lane), default=0)
    if not end:
        return
    label = max(map(len, spans))
    for name, lane in spans.items():
        yield f"{name:<{label}} │{''.join(_column(lane, at, end, width) for at in range(width))}│"
    yield f"{'':<{label}} 0{f'{end:,}':>{width + 1}}"


def _column(lane: list[Span], at: int, end: int, width: int) -> str:
    low, high = at * end / width, (at + 1) * end / width
    shares: dict[str, float] = {" ": (high - low) / 1000}
    for span in lane:
        if (part := min(span.end, high) - max(span.start, low)) > 0:
            shares[span.mark] = shares.get(span.mark, 0) + part
    return max(shares, key=lambda mark: shares[mark])


def tree(root: Node) -> Iterator[str]:
    yield root.text
    yield from _children(root, "")


def _children(node: Node, indent: str) -> Iterator[str]:
    for child in node.children:
        last = child is node.children[-1]
        yield f"{indent}{'└─ ' if last else '├─ '}{child.text}"
        yield from _children(child, indent + ("   " if last else "│  "))
