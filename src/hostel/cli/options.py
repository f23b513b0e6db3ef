"""Options that verbs share, and how their texts become values.

A help page shows options in sections. Values are parsed here, once; what is no size, no volume … is a
``HostelError`` with one line, like every other failure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from hostel.errors import UserError
from hostel.spec import Cache, Disk, FileServer, Limits, Rate, Volume, parse_size

from .line import option
from .say import say

if TYPE_CHECKING:
    from hostel.plan import Plan

_DURATION = r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?"
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_CPU = r"[0-9]{1,4}"
_HOSTNAME = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?"


_VOLUME_WORDS = {"cache": get_args(Cache), "server": get_args(FileServer)}
_VOLUME_NAMES = ("owner", *_VOLUME_WORDS)


def meant(near: Sequence[str] | None) -> str:
    """``; did you mean …?``, or nothing."""
    return f"; did you mean {near[0]}?" if near else ""


def duration(text: str) -> float:
    """Seconds from ``10``, ``1.5``, ``500ms``, ``2m``, ``1h``."""
    match = re.fullmatch(_DURATION, text)
    if match is None:
        raise UserError(f"not a duration: {text!r}", cure="write seconds, or such as 500ms, 2m, 1h")
    return float(match[1]) * _SECONDS[match[2] or "s"]


_DISK_WORDS: dict[str, tuple[str, ...]] = {
    "format": ("raw", "qcow2", "vmdk", "vhdx"),
    "cache": ("writeback", "writethrough", "none", "unsafe"),
    "plane": ("auto", "python", "vhost-user"),
}
_DISK_RATES = {"bps": "bytes", "iops": "operations"}


def disk(text: str) -> Disk:
    """``PATH[:ro][,overlay][,NAME=VALUE…]``; in a path, ``,,`` stands for a comma."""
    name, *words = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    path, read_only = _suffix(name)
    if not path:
        raise UserError(f"not a disk: {text!r}", cure="write PATH or PATH:ro")
    fields: dict[str, Any] = {"path": path, "read_only": read_only}
    rates: dict[str, int] = {}
    for word in words:
        _disk_word(word, fields, rates)
    return Disk(**fields, limits=_limits(rates))


def _disk_word(word: str, fields: dict[str, Any], rates: dict[str, int]) -> None:
    key, _, value = word.partition("=")
    if word == "overlay":
        fields["overlay"] = True
    elif key == "serial" and value:
        fields["serial"] = value
    elif key == "queues" and value.isdecimal():
        fields["queues"] = int(value)
    elif value in _DISK_WORDS.get(key, ()):
        fields[key] = value
    elif key.removesuffix("-burst") in _DISK_RATES:
        rates[key] = parse_size(value)
    else:
        known = ["overlay", "serial=", "queues=", "bps=", "iops=", "bps-burst=", "iops-burst="]
        from difflib import get_close_matches

        known += [f"{name}={one}" for name, ones in _DISK_WORDS.items() for one in ones]
        raise UserError(
            f"not known of a disk: {word!r}{meant(get_close_matches(word, known))}",
            cure="see hostel run --help; a comma in a path is written twice",
        )


def _limits(rates: dict[str, int]) -> Limits:
    """From ``bps``, ``iops`` and their bursts."""
    found = {}
    for key, name in _DISK_RATES.items():
        burst = rates.get(f"{key}-burst", 0)
        if key in rates:
            found[name] = Rate(per_second=rates[key], burst=burst)
        elif burst:
            raise UserError(f"{key}-burst without {key}", cure=f"give {key}=RATE too")
    return Limits(**found)


def volume(text: str) -> Volume:
    """``HOST:GUEST[:ro][,NAME=VALUE…]``; in a path, ``,,`` stands for a comma."""
    paths, *words = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    pair, read_only = _suffix(paths)
    source, colon, target = pair.rpartition(":")
    if not (source and colon and target.startswith("/")):
        raise UserError(
            f"not a volume: {text!r}",
            cure="write HOST:GUEST or HOST:GUEST:ro, with an absolute path in the guest",
        )
    fields: dict[str, Any] = dict(map(_volume_word, words))
    return Volume(source=source, target=target, read_only=read_only, **fields)


def root(text: str) -> tuple[str, FileServer]:
    """``host``, a path, and who serves it: ``[,server=NAME]``; in a path, ``,,`` stands for a comma."""
    path, *words = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    servers: dict[str, FileServer] = {f"server={name}": name for name in get_args(FileServer)}
    for word in words:
        if word not in servers:
            raise UserError(f"not a word of a root: {word!r}", cure=f"one of {', '.join(servers)}")
    return path, servers[words[-1]] if words else "auto"


def _volume_word(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    if not value or value not in _VOLUME_WORDS.get(name, (value,)) or name not in _VOLUME_NAMES:
        known = [f"{name}={'|'.join(values)}" for name, values in _VOLUME_WORDS.items()]
        cure = f"one of owner=UID:GID, {', '.join(known)}; a comma in a path is written ,,"
        raise UserError(f"not a word of a volume: {word!r}", cure=cure)
    return name, value


def _suffix(text: str) -> tuple[str, bool]:
    """The text before a last ``:ro`` or ``:rw``, and whether it said read-only."""
    for mode in ("ro", "rw"):
        if text.endswith(f":{mode}"):
            return text[: -len(mode) - 1], mode == "ro"
    return text, False


def cpu_list(text: str) -> tuple[int, ...]:
    """``0,2-4`` as numbers, in order."""
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (re.fullmatch(_CPU, first) and re.fullmatch(_CPU, last)):
            raise UserError(f"not a list of CPUs: {text!r}", cure="write such as 0,2 or 0-3")
        cpus += range(int(first), int(last) + 1)
    return tuple(cpus)


def hostname(text: str) -> str:
    """A name that sethostname(2) and DNS both take."""
    if not re.fullmatch(_HOSTNAME, text):
        raise UserError(
            f"not a host name: {text!r}", cure="use letters, digits, '-' and '.', at most 64"
        )
    return text


MACHINE = (
    option(
        "Machine",
        "--engine",
        choices=("auto", "kvm", "qemu", "soft"),
        default="auto",
        help="What runs it; auto: kvm if this host's runs Linux at speed, else qemu; never soft.",
    ),
    option("Machine", "--cpus", type=int, default="1", metavar="N", help="vCPUs. [default: 1]"),
    option(
        "Machine",
        "-m",
        "--memory",
        type=parse_size,
        metavar="SIZE",
        help="Memory, such as 512M or 2G. [default: 512M]",
    ),
    option(
        "Machine",
        "--kernel",
        default="",
        metavar="PATH|RELEASE",
        completes="kernel",
        help="Guest kernel. [default: the newest of `hostel kernel ls`]",
    ),
    option(
        "Machine",
        "--initrd",
        default="",
        metavar="PATH",
        completes="path",
        help="A further initramfs.",
    ),
    option("Machine", "--append", default="", metavar="TEXT", help="More kernel command line."),
    option(
        "Machine",
        "--disk",
        name="disks",
        type=disk,
        multiple=True,
        metavar="PATH[:ro][,…]",
        completes="path",
        help="A disk: a raw or qcow2 image, a block device. More words: overlay, format=, cache=, "
        "queues=, serial=, plane=, bps=, iops=, bps-burst=, iops-burst= (docs/disks.md).",
    ),
    option(
        "Machine",
        "--pin",
        type=cpu_list,
        metavar="LIST",
        help="The pCPU of each vCPU, such as 2,3.",
    ),
    option(
        "Machine",
        "--balloon",
        flag=True,
        help="Memory that the guest no longer uses goes back to the host.",
    ),
    option(
        "Machine",
        "--vsock",
        choices=("none", "auto", "vhost", "python"),
        default="none",
        bare="auto",
        help="Sockets between guest and host, served by the kernel (vhost) or by hostel.",
    ),
    option("Machine", "--hugepages", flag=True, help="Memory from the host's hugepages."),
    option(
        "Machine",
        "--transport",
        choices=("pci", "mmio"),
        default="pci",
        help="How virtio devices are attached. [default: pci]",
    ),
)
"""What the machine is."""

OUTPUT = (
    option("Output", "-q", "--quiet", flag=True, voice=True, help="Say nothing but errors."),
    option("Output", "--verbose", flag=True, voice=True, help="Say what is done."),
    option(
        "Output",
        "--debug",
        flag=True,
        voice=True,
        help="Say everything; a bug shows its traceback.",
    ),
)
"""How much hostel says."""


def announce(plan: Plan) -> None:
    """What runs the machine, and why; and what was done otherwise than a user may expect."""
    tell = say.note if plan.spec.engine == "auto" else say.detail
    tell(f"engine {plan.engine}: {plan.reason}")
    if plan.vsock is not None:
        tell = say.note if plan.spec.vsock == "auto" else say.detail
        tell(f"vsock served by {plan.vsock.plane}: {plan.vsock.reason}")
    for note in plan.notes:
        say.note(note)
    for interface in plan.nics:
        say.detail(f"network: {interface.summary}")
    say.detail(f"kernel {plan.kernel}")
    say.detail(f"command line: {plan.cmdline}")


def environment(
    pairs: Iterable[str], files: Iterable[str], host: Mapping[str, str]
) -> dict[str, str]:
    """What ``--env-file`` and ``-e`` say, later ones first heard; a bare name copies the host's."""
    given: dict[str, str] = {}
    for line in (*(line for path in files for line in _env_lines(path)), *pairs):
        name, equals, value = line.partition("=")
        if not name or "\0" in line:
            raise UserError(
                f"not a variable: {line!r}", cure="write NAME=VALUE, or NAME to copy the host's"
            )
        if equals:
            given[name] = value
        elif name in host:
            given[name] = host[name]
    return given


def _env_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
