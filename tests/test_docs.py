"""The commands and examples of README and docs/ are run, so that what a reader tries works.

```console            each `$ command` is run by bash, in the checkout, with `hostel` on the PATH;
                      it must succeed; lines under it are what it prints (standard output, then
                      standard error); `…` stands for anything, in a line or as a line of its own
```python             run as a program; with `>>>`, as a doctest
```console qemu       words behind are pytest's marks (qemu, linux_kvm, slow): what it needs
```sh, ```text        are only shown: a command that installs something, a transcript
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(console|python)([ \w]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str


def examples() -> Iterator[Example]:
    for page in PAGES:
        text = page.read_text()
        for fence in FENCE.finditer(text):
            line = text.count("\n", 0, fence.start()) + 2
            yield Example(page, line, fence[1], tuple(fence[2].split()), fence[3])


def parameters(language: str) -> list[object]:
    return [
        pytest.param(
            example,
            id=f"{example.page.name}:{example.line}",
            marks=[getattr(pytest.mark, mark) for mark in example.marks],
        )
        for example in examples()
        if example.language == language
    ]


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command, with its continuation lines (`> …`), and the output shown for it."""
    command, output = "", list[str]()
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:], []
        elif line.startswith("> ") and not output:
            command += "\n" + line[2:]
        else:
            output.append(line)
    if command:
        yield command, output


def matches(expected: list[str], actual: str) -> bool:
    """`…` alone in a line stands for any number of lines, within a line for any characters."""
    parts = [
        r"(?:.*\n)*?" if line.strip() == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in expected
    ]
    return (
        re.fullmatch("".join(parts), actual if actual.endswith("\n") else actual + "\n") is not None
    )


@pytest.mark.parametrize("example", parameters("console"))
def test_console(example: Example) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command, expected in commands(example.text):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=TOP,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, f"$ {command}\n{output}"
        if expected:
            assert matches(expected, output), (
                f"$ {command}\n{output}\nbut the page shows\n{expected}"
            )


@pytest.mark.parametrize("example", parameters("python"))
def test_python(example: Example) -> None:
    where = f"{example.page.name}:{example.line}"
    if ">>>" not in example.text:
        exec(
            compile("\n" * (example.line - 1) + example.text, str(example.page), "exec"),
            {"__name__": where},
        )
        return
    test = doctest.DocTestParser().get_doctest(
        example.text, {}, where, str(example.page), example.line
    )
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert result.attempted > 0
    assert result.failed == 0, "".join(report)


@pytest.mark.parametrize(
    ("expected", "actual", "verdict"),
    [
        (["7"], "7\n", True),
        (["7"], "8\n", False),
        (["Linux … x86_64"], "Linux 6.1 x86_64\n", True),
        (["first", "…", "last"], "first\nlast\n", True),
        (["first", "…", "last"], "first\na\nb\nlast\n", True),
        (["first", "…"], "second\n", False),
        (["a.c"], "abc\n", False),
    ],
)
def test_matching(expected: list[str], actual: str, verdict: bool) -> None:
    assert matches(expected, actual) is verdict
