"""How the texts of options become values."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.cli import options
from hostel.errors import SpecError, UserError
from hostel.spec import Disk, Volume


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10), ("1.5", 1.5), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("0", 0)],
)
def test_duration(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "1e3", "s", "1 s", "nan", "inf", "1y"])
def test_no_duration(text: str) -> None:
    with pytest.raises(UserError, match="not a duration"):
        options.duration(text)


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("/a:/b", Volume(source="/a", target="/b")),
        ("a:/b:ro", Volume(source="a", target="/b", read_only=True)),
        ("/a:/b:rw", Volume(source="/a", target="/b")),
        ("/with:colon:/b", Volume(source="/with:colon", target="/b")),
        ("/a,,b:/c,,d:ro", Volume(source="/a,b", target="/c,d", read_only=True)),
        (
            "/a:/b:ro,cache=always,owner=1000:100,server=python",
            Volume(
                source="/a",
                target="/b",
                read_only=True,
                cache="always",
                owner="1000:100",
                server="python",
            ),
        ),
    ],
)
def test_volume(text: str, volume: Volume) -> None:
    assert options.volume(text) == volume


@pytest.mark.parametrize("text", ["", "/a", "/a:", ":/b", "/a:b", "/a:ro", "/a:/b:xx"])
def test_no_volume(text: str) -> None:
    with pytest.raises(UserError, match="not a volume"):
        options.volume(text)


@pytest.mark.parametrize("word", ["", "cache", "cache=", "cache=maybe", "own=1:1", "ro"])
def test_no_word_of_a_volume(word: str) -> None:
    with pytest.raises(UserError, match="not a word of a volume"):
        options.volume(f"/a:/b,{word}")


@pytest.mark.parametrize("owner", ["1000", "a:b", "1:2:3", "4294967295:0"])
def test_no_owner_of_a_volume(owner: str) -> None:
    with pytest.raises(SpecError, match="not an owner"):
        options.volume(f"/a:/b,owner={owner}")


def test_disk() -> None:
    assert options.disk("a.img") == Disk(path="a.img")
    assert options.disk("a.img:ro") == Disk(path="a.img", read_only=True)
    with pytest.raises(UserError, match="not a disk"):
        options.disk(":ro")


def test_cpu_list() -> None:
    assert options.cpu_list("0,2-4,1") == (0, 2, 3, 4, 1)
    for text in ("", "a", "1-", "-1", "1,,2", "0-4000000000"):
        with pytest.raises(UserError, match="not a list of CPUs"):
            options.cpu_list(text)


@pytest.mark.parametrize("text", ["a", "web-1", "a.example", "x" * 64])
def test_hostname(text: str) -> None:
    assert options.hostname(text) == text


@pytest.mark.parametrize("text", ["", "-a", "a b", "a/b", "x" * 65, "ä", "a\n"])
def test_no_hostname(text: str) -> None:
    with pytest.raises(UserError, match="not a host name"):
        options.hostname(text)


def test_environment(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\n\nA=file\nB=x=y\nHOST\n")
    host = {"HOST": "copied", "SECRET": "stays"}
    given = options.environment(["A=option", "EMPTY=", "ABSENT"], [str(file)], host)
    assert given == {"A": "option", "B": "x=y", "HOST": "copied", "EMPTY": ""}


def test_no_environment(tmp_path: Path) -> None:
    for pair in ("", "=x", "a\0=b"):
        with pytest.raises(UserError, match="not a variable"):
            options.environment([pair], [], {})
    with pytest.raises(UserError, match="cannot read"):
        options.environment([], [str(tmp_path / "none")], {})
