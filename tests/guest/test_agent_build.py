"""The agent's binary: static, cached by content, and a clear word without a compiler."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hostel.errors import HostError, MissingTool
from hostel.guest import build
from hostel.guest.protocol import c_header


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hostel" / "agent"


def test_built_once(cache: Path) -> None:
    first = build.agent_binary()
    stamp = first.stat().st_mtime_ns
    assert build.agent_binary() == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in cache.iterdir()] == [first.name]
    assert first.stat().st_size < 1 << 20


def test_it_is_static(cache: Path) -> None:
    """A guest's initramfs has no shared libraries: PT_INTERP would name a loader."""
    output = subprocess.run(
        ["readelf", "-l", build.agent_binary()], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in output
    assert "LOAD" in output


def test_the_sources_are_part_of_the_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.agent_binary().name
    monkeypatch.setattr("hostel.guest.build.c_header", lambda: c_header() + "#define NEW 1\n")
    assert build.agent_binary().name != before


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingTool, match="apt-get install gcc libc6-dev"):
        build.agent_binary()


def test_failing_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostel.guest.build.c_header", lambda: "#error broken on purpose\n")
    with pytest.raises(HostError, match="broken on purpose"):
        build.agent_binary()
    assert list(cache.iterdir()) == []


def test_no_warnings(tmp_path: Path) -> None:
    sources = (Path(build.__file__).parent / "agent").glob("*.c")
    (tmp_path / "protocol.h").write_text(c_header())
    flags = ["-std=gnu17", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-O2", f"-I{tmp_path}"]
    command = ["cc", *flags, "-o", str(tmp_path / "agent"), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
