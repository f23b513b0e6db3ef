"""What the command does before any machine: verbs, help, errors, streams."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cli.hostel_command import HOSTEL, Hostel
from hostel.cli import clicked, entry
from hostel.version import VERSION


def test_version_is_the_packages(hostel: Hostel) -> None:
    result = hostel("--version")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == f"hostel {importlib.metadata.version('hostel')}\n"
    assert importlib.metadata.version("hostel") == VERSION


def test_version_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--version']; from hostel.cli import main; main();"
        "print(*{'click', 'msgspec', 'importlib.metadata'} & set(sys.modules))"
    )
    argv = [os.path.dirname(HOSTEL) + "/python", "-c", program]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert result.stdout == f"hostel {VERSION}\n\n"


@pytest.mark.parametrize(
    ("moment", "code"),
    [
        ("msgspec", -signal.SIGINT),
        ("click", 128 + signal.SIGINT),
        ("hostel.cli.doctor", 128 + signal.SIGINT),
    ],
)
def test_interrupt_during_an_import(moment: str, code: int) -> None:
    """Ctrl-C at the moment when a module is looked for."""
    program = f"""
import os, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {moment!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv[1:] = ["doctor"]
from hostel.cli import main
sys.exit(main())
"""
    python = str(Path(HOSTEL).with_name("python"))
    result = subprocess.run([python, "-c", program], capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


def test_nothing_interrupts_the_clean_up() -> None:
    from hostel.cli.signals import Signals

    cleaned = []

    def work() -> None:
        with Signals(timeout=None, stop_timeout=1.0):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                cleaned.append("all")

    with pytest.raises(entry.EndedBySignal):
        work()
    assert cleaned == ["all"]


def test_python_m_hostel() -> None:
    python = str(Path(HOSTEL).with_name("python"))
    result = subprocess.run([python, "-m", "hostel", "--version"], capture_output=True, check=True)
    assert result.stdout.decode() == f"hostel {VERSION}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_is_on_standard_output(hostel: Hostel, arguments: list[str]) -> None:
    result = hostel(*arguments)
    assert (result.returncode, result.stderr) == (0, b"")
    assert all(verb.encode() in result.stdout for verb in clicked.VERBS)


@pytest.mark.parametrize("verb", list(clicked.VERBS))
def test_every_verb_has_help(hostel: Hostel, verb: str) -> None:
    result = hostel(verb, "--help")
    assert (result.returncode, result.stderr) == (0, b"")
    assert f"Usage: hostel {verb}".encode() in result.stdout
    assert max(map(len, result.stdout.decode().splitlines())) <= 80


USAGE = [
    (["--vers"], "no option --vers; did you mean --version?"),
    (["rnu"], "no verb 'rnu'; did you mean run?"),
    (["xyzzy"], "no verb 'xyzzy'; see `hostel --help`"),
    (["kernel", "lss"], "no verb 'lss'; did you mean ls?"),
    (["run", "--memroy", "1G", "true"], "no option --memroy; did you mean --memory?"),
    (["run", "--bogus", "true"], "no option --bogus; see `hostel run --help`"),
    (["run", "--cpus"], "'--cpus' requires an argument"),
    (["run", "--cpus", "many", "true"], "'many' is not a valid integer"),
    (["run", "--cpus", "0", "true"], "cpus must be 1 to 32, not 0"),
    (["run", "--cpus", "33", "true"], "cpus must be 1 to 32, not 33"),
    (["run", "-m", "lots", "true"], "not a size: 'lots'"),
    (["run", "-m", "1K", "true"], "memory must be at least 33554432 bytes (32M), not 1024"),
    (["run", "--engine", "soft", "true"], "not for Linux"),
    (["boot", "--engine", "soft"], "engine soft has no kernel of its own"),
    (
        ["boot", "--paging", "shadow"],
        "paging, trap, record, replay and trace are words of engine soft",
    ),
    (["run", "-v", "nothing", "true"], "not a volume: 'nothing'"),
    (["run", "--tmpfs", "relative", "true"], "must be absolute"),
    (["run", "--timeout", "soon", "true"], "not a duration: 'soon'"),
    (["run", "-H", "a b", "true"], "not a host name: 'a b'"),
    (["run", "--name", "a/b", "true"], "not a machine name: 'a/b'"),
    (["run", "--pin", "0,1", "true"], "pin names 2 pCPUs for 1 vCPUs"),
    (["run", "--root", "/no/such/root", "true"], "root /no/such/root: No such file"),
    (["run", "--env-file", "/no/such/file", "true"], "cannot read /no/such/file"),
    (["run", "-w", "relative", "true"], "--workdir must be absolute"),
    (["run"], "no command, and no terminal for a shell"),
    (["run", "--", ""], "an empty command"),
    (["completion", "tcsh"], "'tcsh' is not one of"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=lambda value: str(value)[:40])
def test_wrong_use_is_one_line_and_125(hostel: Hostel, arguments: list[str], message: str) -> None:
    result = hostel(*arguments)
    stderr = result.stderr.decode()
    assert result.returncode == 125
    assert result.stdout == b""
    assert stderr.startswith("hostel: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def test_error_lines_cannot_drive_the_terminal(hostel: Hostel) -> None:
    result = hostel("run", "--root", "/no/\x1b[31m\nevil", "true")
    assert result.stderr.count(b"\n") == 1
    assert b"\x1b" not in result.stderr


def test_no_colour_off_a_terminal(hostel: Hostel) -> None:
    assert b"\x1b" not in hostel("doctor").stdout


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "| true", "2>&- >&- <&-"])
def test_standard_output_that_takes_nothing(redirection: str) -> None:
    """One line or silence; never a traceback."""
    script = f"set -o pipefail; {HOSTEL} kernel ls --help {redirection}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    expected = {">/dev/full": {125}, "| true": {0, 141}}.get(redirection, {0})
    assert result.returncode in expected
    assert result.stderr.count(b"\n") == (redirection == ">/dev/full")


def test_a_bug_is_one_line_and_a_traceback_only_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hostel.cli.say import say
    from hostel.host import kernels

    def broken() -> tuple[()]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(kernels, "survey", broken)
    monkeypatch.setattr(say, "debug", False)
    assert entry.command_line(["kernel", "ls"]) == 125
    short = capsys.readouterr().err
    assert short == "hostel: a bug in hostel: ZeroDivisionError: oops; --debug shows where\n"
    assert entry.command_line(["kernel", "ls", "--debug"]) == 125
    assert "Traceback" in capsys.readouterr().err


# -- kernel, doctor, completion ---------------------------------------------------------------


def test_kernel_ls(hostel: Hostel, tmp_path: Path) -> None:
    boot = tmp_path / "hostel/kernels/6.1.0-9-cloud-amd64/boot"
    boot.mkdir(parents=True)
    (boot / "vmlinuz-6.1.0-9-cloud-amd64").write_bytes(b"kernel")
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    text = hostel("kernel", "ls", env=env).stdout.decode()
    row = next(line for line in text.splitlines() if line.startswith("6.1.0-9-cloud-amd64"))
    assert "fetched" in row
    assert "(no modules)" in row
    records = json.loads(hostel("kernel", "ls", "--json", env=env).stdout)
    record = next(r for r in records if r["release"] == "6.1.0-9-cloud-amd64")
    assert record["image"] == str(boot / "vmlinuz-6.1.0-9-cloud-amd64")
    assert record["modules"] is None


def test_kernel_fetch_without_apt(hostel: Hostel, tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    result = hostel("kernel", "fetch", env=env)
    assert result.returncode == 125
    assert b"not Debian" in result.stderr
    assert b"--kernel PATH" in result.stderr


def test_doctor_says_the_same_in_both_forms(hostel: Hostel) -> None:
    text, data = hostel("doctor"), hostel("doctor", "--json")
    report = json.loads(data.stdout)
    assert text.returncode == data.returncode == (0 if report["works"] else 1)
    lines = text.stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80
    for finding in report["findings"]:
        assert any(line.startswith(f"{finding['state']:<9}{finding['name']}") for line in lines)
    assert ("works here" if report["works"] else "cannot work here") in lines[-1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(hostel: Hostel, shell: str) -> None:
    result = hostel("completion", shell)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"_HOSTEL_COMPLETE=" in result.stdout


def test_completion_completes(hostel: Hostel) -> None:
    def complete(words: str) -> list[str]:
        variables = {"_HOSTEL_COMPLETE": "bash_complete", "COMP_WORDS": words}
        env = {**os.environ, **variables, "COMP_CWORD": str(len(words.split(" ")) - 1)}
        return hostel(env=env).stdout.decode().split()

    assert complete("hostel ke") == ["plain,kernel"]
    assert "plain,--memory" in complete("hostel run --m")
    assert complete("hostel run --engine k") == ["plain,kvm"]
