"""One build of unicorn is known; any other is refused in one clear line."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import pytest

pytest.importorskip("unicorn", reason="the extra `soft` is not installed")

from hostel.errors import HostError, MissingTool
from hostel.soft.core import build
from hostel.soft.core.engine import Engine
from hostel.soft.core.env import FEATURES
from hostel.soft.cpuid import supported
from hostel.soft.silicon import Reason
from hostel.soft.state import RAX
from soft.core.core_rig import Bench


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: "2.2.0")
    with pytest.raises(HostError, match=r"unicorn 2\.2\.0 is not 2\.1\.4") as caught:
        build.library()
    assert "pip install" in str(caught.value)


def test_without_unicorn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingTool, match=r"hostel\[soft\]"):
        build.library()


def test_another_kind_of_host_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="x86-64"):
        build.library()


@pytest.mark.parametrize("name", ["UC_CPU", "CPU_ENV", "CPU_ENV_POINTER", "CPU_HANDLE", "CPU_TLB"])
def test_an_offset_that_is_not_right_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, name, getattr(build, name) + 8)
    with pytest.raises(HostError, match="not the one that hostel knows"):
        Engine(lambda _page, _kind: None, lambda _block: False)


def test_a_library_without_our_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(lib: object) -> object:
        del lib
        raise AttributeError("tlb_flush_x86_64")

    monkeypatch.setattr(build, "_declare", lacking)
    with pytest.raises(HostError, match="tlb_flush_x86_64"):
        build.library()


def test_the_fpu_is_carried_from_core_to_core() -> None:
    fill = "mov $0x3ff80000, %eax; shl $32, %rax; movq %rax, %xmm9; fldpi; hlt"
    with Bench(fill) as first, Bench("movq %xmm9, %rax; fstp %st(0); hlt") as second:
        assert first.run().reason is Reason.HLT
        second.core.load_fpu(first.core.save_fpu())
        assert second.run().reason is Reason.HLT
        assert second.state.gpr[RAX] == 0x3FF8 << 48


def test_a_new_core_has_its_fpu_reset() -> None:
    with Bench("sub $8, %rsp; stmxcsr (%rsp); fnstcw 4(%rsp); mov (%rsp), %rax; hlt") as bench:
        assert bench.run().reason is Reason.HLT
        assert bench.state.gpr[RAX] == 0x1F80 | 0x37F << 32


@pytest.mark.parametrize("instruction", ["rdrand %eax", "rdseed %eax"])
def test_chance_is_no_instruction_of_this_processor(instruction: str) -> None:
    with Bench(f"{instruction}; hlt") as bench:
        bench.controls.exception_bitmap = 1 << 6  # #UD
        event = bench.run().interruption
        assert event is not None
        assert event.vector == 6


def test_cpuid_names_only_what_the_processor_can_do() -> None:
    shown = {entry.function: entry for entry in supported()}
    with Bench() as bench:
        edx, ecx, ebx = bench.core.engine.env.u64[FEATURES // 8 : FEATURES // 8 + 3]
    beyond = (shown[1].edx & ~edx, shown[1].ecx & ~ecx, shown[7].ebx & ~ebx)
    assert beyond == (0, 0, 0)
