"""Every structure, request and constant of ``hostel.abi.kvm`` against the C compiler's own view.

The C probe is written from the Python definitions, so a definition that is added there is compared
here without a further line. ``#ifdef`` skips a constant that this host's headers do not know; from
Linux 6.1 on they must know all.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from abi.c_probe import run
from hostel.abi import kvm as abi
from hostel.abi import kvm_later, kvm_numbers

EVERYTHING = {**vars(kvm_later), **vars(abi)}


def snake(name: str) -> str:
    return "kvm_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def structures() -> list[type[ctypes.Structure]]:
    return [
        value
        for name, value in EVERYTHING.items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value is not ctypes.Structure
        and not name.startswith("_")
    ]


def numbers() -> dict[str, int]:
    return {
        name: value for name, value in EVERYTHING.items() if name.isupper() and type(value) is int
    }


def fields(
    cls: type[ctypes.Structure | ctypes.Union], prefix: str = "", base: int = 0
) -> Iterator[tuple[str, int, int]]:
    """C path, offset and size of every field, down into nested structures."""
    anonymous = getattr(cls, "_anonymous_", ())
    for name, kind, *_ in cls._fields_:
        offset = base + getattr(cls, name).offset
        if name not in anonymous:
            yield prefix + name, offset, ctypes.sizeof(kind)
        if issubclass(kind, ctypes.Structure | ctypes.Union):
            inner = prefix if name in anonymous else f"{prefix}{name}."
            yield from fields(kind, inner, offset)


def expected() -> dict[str, int]:
    table = {}
    for cls in structures():
        struct = snake(cls.__name__)
        table[f"sizeof {struct}"] = ctypes.sizeof(cls)
        for path, offset, size in fields(cls):
            table[f"offsetof {struct} {path}"] = offset
            table[f"sizeof {struct} {path}"] = size
    for name, value in numbers().items():
        table[f"number KVM_{name}"] = value
    return table


def probe_source() -> str:
    lines = []
    for key in expected():
        kind, what, *path = key.split()
        if kind == "number":
            lines += [f"#ifdef {what}", f'SHOW("{key}", {what});', "#endif"]
        elif kind == "offsetof":
            lines.append(f'SHOW("{key}", offsetof(struct {what}, {path[0]}));')
        elif path:
            lines.append(f'SHOW("{key}", sizeof(((struct {what} *)0)->{path[0]}));')
        else:
            lines.append(f'SHOW("{key}", sizeof(struct {what}));')
    body = "\n".join(lines)
    template = Path(__file__).with_name("kvm_probe.c").read_text()
    return template.replace("/* PROBES */", body)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return run(probe_source(), tmp_path_factory.mktemp("probe"))


def test_every_definition_agrees_with_the_headers(found: dict[str, int]) -> None:
    ours = expected()
    wrong = {
        key: (ours[key], value) for key, value in found.items() if ours.get(key, value) != value
    }
    assert wrong == {}
    assert len(found) > 600


def test_headers_of_linux_6_1_know_every_constant(found: dict[str, int]) -> None:
    if found["LINUX_VERSION_CODE"] < 0x6_01_00:
        pytest.skip("these headers are older than Linux 6.1")
    assert expected().keys() - found.keys() == set()


def test_the_traps_that_others_fell_into() -> None:
    assert ctypes.sizeof(abi.IrqRoutingEntry) == 48
    assert ctypes.sizeof(abi.CpuidEntry2) == 40
    assert abi.SET_CPUID2 == 0x4008AE90  # the header's size only
    assert abi.SET_GSI_ROUTING == 0x4008AE6A


def test_everything_is_shown_by_the_one_module() -> None:
    for module in (kvm_numbers, kvm_later):
        for name, value in vars(module).items():
            if name.isupper() or (isinstance(value, type) and not name.startswith("_")):
                assert getattr(abi, name) is value


def test_a_name_that_nobody_has_is_no_name_of_it() -> None:
    with pytest.raises(AttributeError, match="SET_NOTHING"):
        abi.SET_NOTHING  # type: ignore[attr-defined]  # noqa: B018
