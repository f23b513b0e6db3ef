"""How the texts of options become values."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostel.cli import options
from hostel.errors import SpecError, UserError
from hostel.spec import Disk, Limits, Rate, Volume


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


MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("disk.img", Disk(path="disk.img")),
        ("disk.img:ro", Disk(path="disk.img", read_only=True)),
        ("disk.img:rw", Disk(path="disk.img")),
        ("a,,b.img,overlay", Disk(path="a,b.img", overlay=True)),
        (
            "d,format=qcow2,cache=none,queues=4,plane=vhost-user,serial=S-1",
            Disk(
                path="d", format="qcow2", cache="none", queues=4, plane="vhost-user", serial="S-1"
            ),
        ),
        (
            "d,bps=8M,bps-burst=16M,iops=500",
            Disk(
                path="d",
                limits=Limits(
                    bytes=Rate(per_second=8 * MIB, burst=16 * MIB), operations=Rate(per_second=500)
                ),
            ),
        ),
    ],
)
def test_disk(text: str, disk: Disk) -> None:
    assert options.disk(text) == disk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a disk"),
        (":ro", "not a disk"),
        ("d,overlya", "did you mean overlay"),
        ("d,cache=nono", "did you mean cache=none"),
        ("d,queues=many", "not known of a disk"),
        ("d,serial=", "not known of a disk"),
        ("d,queues=0", "1 to 16 queues"),
        ("d,queues=17", "1 to 16 queues"),
        ("d,serial=123456789012345678901", "at most 20 bytes"),
        ("d:ro,overlay", "exclude each other"),
        ("d,bps=fast", "not a size"),
        ("d,bps=0", "not a rate"),
        ("d,bps-burst=1M", "bps-burst without bps"),
    ],
)
def test_no_disk(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        options.disk(text)


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
