"""The short way to read a command line, beside click's: the same, or nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import click
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostel.cli import boot, clicked, run
from hostel.cli.line import Line, Option, Verb, option, read
from hostel.cli.say import say
from hostel.errors import HostelError

VERBS = (run.VERB, boot.VERB)
VOICE = ("quiet", "verbose", "debug")

seen: list[Line] = []


def keep(line: Line) -> int:
    seen.append(line)
    return 0


COMMANDS = {verb.name: clicked.command(msgspec.structs.replace(verb, call=keep)) for verb in VERBS}

TEXTS = [
    "",
    "-",
    "--",
    "0",
    "1",
    "7",
    "x",
    "a b",
    "--cpus",
    "-q",
    "1.5",
    "2m",
    "512M",
    "auto",
    "none",
]
TEXTS += [
    "kvm",
    "soft",
    "python",
    "pci",
    "ept",
    "0-3",
    "a.img:ro",
    "/a:/b",
    "a=b",
    "nat",
    "nat,mtu=1",
]
TEXTS += [
    "8080:80",
    "host,server=python",
    "vm-1",
    "a_b",
    "\u0663",
    "1_0",
    " 1",
    "é",
    "\ud800",
    "--vsock=auto",
]


def names(one: Option) -> tuple[str, ...]:
    return (*one.names, *one.off)


def words(verb: Verb) -> st.SearchStrategy[list[str]]:
    """Any line: of this verb's options and of texts that some of them take."""
    known = [name for one in verb.options for name in names(one)] + [
        "--help",
        "-h",
        "--bogus",
        "--verb",
    ]
    name, text = st.sampled_from(known), st.sampled_from(TEXTS) | st.text(max_size=3)
    piece = (
        st.tuples(name, text)
        | st.builds(lambda n, t: (f"{n}={t}",), name, text)
        | st.builds(lambda n, t: (f"{n}{t}",), name, text)
        | st.tuples(name)
        | st.tuples(text)
    )
    return st.lists(piece, max_size=6).map(
        lambda pieces: [word for piece in pieces for word in piece]
    )


LINES = st.sampled_from(VERBS).flatmap(lambda verb: st.tuples(st.just(verb), words(verb)))


def by_click(verb: Verb, line: list[str]) -> Any:
    """What click makes of it: the ``Line``, or its answer."""
    seen.clear()
    try:
        with COMMANDS[verb.name].make_context(verb.name, list(line)) as context:
            COMMANDS[verb.name].invoke(context)
    except (click.ClickException, click.exceptions.Exit, HostelError) as answer:
        return answer
    return seen[0]


def by_either(verb: Verb, line: list[str]) -> tuple[Line | None, Any]:
    voices = []
    found = []
    for way in (read, by_click):
        say.quiet = say.verbose = say.debug = False
        try:
            found.append(way(verb, line))
            voices.append([getattr(say, name) for name in VOICE])
        finally:
            say.quiet = say.verbose = say.debug = False
    if found[0] is None:
        assert voices[0] == [False] * 3, "a line that is left to click has no effect"
    else:
        assert voices[0] == voices[1]
    return found[0], found[1]


@settings(max_examples=600, deadline=None)
@given(LINES)
def test_what_is_read_is_what_click_reads(case: tuple[Verb, list[str]]) -> None:
    found, other = by_either(*case)
    assert found is None or found == other


GOOD: dict[str, list[str]] = {
    "env": ["A=1", "B"],
    "timeout": ["1.5", "2m"],
    "stop_timeout": ["0", "1h"],
    "volumes": ["/a:/b", "a:/b:ro,cache=none"],
    "net": ["nat", "none", "bridge=br0,mtu=1400"],
    "publish": ["8080:80", "127.0.0.1:53-54:53-54/udp"],
    "cpus": ["2", "99"],
    "memory": ["512M", "2G"],
    "disks": ["a.img", "b,overlay"],
    "pin": ["0,2-3"],
    "hostname": ["box"],
}


@st.composite
def plain(draw: st.DrawFn, verb: Verb) -> list[str]:
    """A line that is right, written as the help page has it."""
    line: list[str] = []
    for one in draw(st.lists(st.sampled_from(verb.options), max_size=8)):
        name = draw(st.sampled_from(names(one)))
        text = draw(
            st.sampled_from(one.choices or GOOD.get(one.name) or ["some", "two words", "-x"])
        )
        if one.flag or (one.bare and draw(st.booleans())):
            line.append(name)
        elif one.bare or (name.startswith("--") and draw(st.booleans())):
            line.append(f"{name}={text}")
        else:
            line += [name, text]
    if verb.command:
        line += draw(
            st.sampled_from([[], ["true"], ["--", "-x", "--"], ["sh", "-c", "exit 7", "--"]])
        )
    return line


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(VERBS).flatmap(lambda verb: st.tuples(st.just(verb), plain(verb))))
def test_a_line_that_is_right_does_not_need_click(case: tuple[Verb, list[str]]) -> None:
    found, other = by_either(*case)
    assert found is not None
    assert found == other


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_option_is_in_one_table(verb: Verb) -> None:
    line = read(verb, [])
    assert line is not None
    assert line.named == frozenset()
    all_names = [name for one in verb.options for name in names(one)]
    assert len(set(all_names)) == len(all_names)
    if verb is run.VERB:
        assert set(line.values) == set(run.Options.__struct_fields__)


def test_an_options_name() -> None:
    assert option("S", "-s", "--stop-timeout").name == "stop_timeout"
    assert option("S", "--json", name="as_json").name == "as_json"
    assert option("S", "--flag", flag=True).value([]) is False
    assert option("S", "--size", default="7", type=int).value([]) == 7
    assert option("S", "--size", type=int, multiple=True).value(["1", "2"]) == (1, 2)


@pytest.mark.parametrize(("line", "imported"), [(["-m", "64M"], "False"), (["-m64M"], "True")])
def test_what_is_read_needs_no_click(line: list[str], imported: str) -> None:
    argv = ["boot", *line, "--engine", "kvm", "--kernel", "/nonexistent/kernel"]
    program = (
        f"import sys; sys.argv[1:] = {argv}\n"
        "from hostel.cli import main\nprint(main(), 'click' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["125", imported]
    assert "/nonexistent/kernel: no such file" in done.stderr
