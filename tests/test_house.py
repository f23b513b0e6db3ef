"""The rules of the house, read from the sources: who imports whom, who talks to the kernel, what is public.

The tables below are the rules; ARCHITECTURE.md shows the first of them to people and is compared with it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
SOURCE = TOP / "src" / "hostel"
MODULES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    ("errors", "spec", "abi"),
    ("memory", "hypervisor"),
    ("kvm", "soft"),
    ("vmm",),
    ("devices", "virtio", "boot"),
    ("guest", "host"),
    ("plan", "root", "prepare", "disks"),
    ("monitor", "qemu"),
    ("machine",),
    ("lab",),
    ("cli",),
)
"""A module imports from the layers above its own, and from its own."""

ANYWHERE = ("version", "console", "cache")
"""Leaves that every layer may use: they import of hostel's the first layer only."""

SIZE_LIMIT = 450
"""Lines of one file: what reads in one sitting, and a little."""

LONGEST = 70
"""Lines of one function; the longest are tables (the options of a command)."""

PUBLIC = {
    *("Machine", "Result", "run"),
    *("MachineSpec", "Disk", "Root", "Volume", "Nic", "Publish", "Limits", "Rate"),
    *("HostelError", "UserError", "SpecError", "ImageError"),
    *("HostError", "KvmError", "HelperError", "MissingTool"),
    *("GuestError", "GuestCrash", "BootError", "AgentError", "MachineStopped", "MachineTimeout"),
}
"""What users may rely on. A name added or taken away here is a change of the interface: CHANGELOG."""

ABI_MAY_IMPORT = {
    *("__future__", "collections", "ctypes", "dataclasses", "enum", "functools"),
    *("itertools", "msgspec", "struct", "types", "typing"),
}
"""abi/ does no I/O: layouts and numbers need no more than this."""

IOCTL_USERS = ("kvm/", "virtio/blk", "virtio/vhost", "virtio/net_port", "host/", "cli/")
"""Who issues ioctls: KVM's, a block device's size, vhost's, a tap's, a probe of the host, a terminal's."""

PROGRAM_STARTERS = ("host/", "guest/build", "soft/mini/build", "qemu/")
"""Who starts programs. All else asks host/."""


def rooms(path: Path) -> tuple[str, ...]:
    """`src/hostel/kvm/vcpu.py` → ("kvm", "vcpu")."""
    return path.relative_to(SOURCE).with_suffix("").parts


def name_of(path: Path) -> str:
    return "/".join(rooms(path))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not for_type_checkers(child):
            yield from walk(child)


def imports(path: Path, root: ast.AST) -> Iterator[tuple[str, ...]]:
    """What the module imports, as absolute dotted names in parts: ("hostel", "kvm", "vcpu", "Vcpu")."""
    package = ("hostel", *rooms(path)[:-1])
    for node in walk(root):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *module, alias.name) for alias in node.names)


def layer_of(room: str) -> int | None:
    return next((number for number, layer in enumerate(LAYERS) if room in layer), None)


def test_architecture_shows_the_layers() -> None:
    text = (TOP / "ARCHITECTURE.md").read_text()
    block = re.search(r"above it in this order:\n\n((?:    .*\n)+)", text)
    assert block, "ARCHITECTURE.md lacks the order of the layers"
    shown = [tuple(part.strip().split(", ")) for part in " ".join(block[1].split()).split("→")]
    assert shown == list(LAYERS)


def test_every_module_has_its_layer() -> None:
    known = {"__init__", "__main__", *ANYWHERE, *(room for layer in LAYERS for room in layer)}
    unknown = [name_of(path) for path in MODULES if rooms(path)[0] not in known]
    assert not unknown, f"not in ARCHITECTURE.md's order of layers: {unknown}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_layers(path: Path) -> None:
    own = rooms(path)[0]
    if own in ("__init__", "__main__"):
        return  # the public names come from the top layer
    wrong = []
    for target in imports(path, tree(path)):
        if target[0] != "hostel" or len(target) < 2 or target[1] in (*ANYWHERE, own):
            continue
        ours, theirs = layer_of(own) or 0, layer_of(target[1])
        if theirs is None or theirs > ours:
            wrong.append(".".join(target))
    assert not wrong, f"{name_of(path)} imports from below: {wrong}"


def module_of(target: tuple[str, ...], names: set[str]) -> str | None:
    """The module file that an imported name lives in."""
    for length in range(len(target), 1, -1):
        name = "/".join(target[1:length])
        for candidate in (name, f"{name}/__init__"):
            if candidate in names:
                return candidate
    return None


def test_no_import_cycles() -> None:
    """At import time; an import inside a function may look back up (it runs later)."""
    names = {name_of(path) for path in MODULES}
    graph = {name_of(path): set(top_level(path, names)) for path in MODULES}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for name in leaves:
            del graph[name]
        graph = {name: needs.difference(leaves) for name, needs in graph.items()}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def top_level(path: Path, names: set[str]) -> Iterator[str]:
    """Modules that importing this one imports at once (statements outside functions)."""
    body = [
        node for node in tree(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    for target in imports(path, ast.Module(body, [])):
        found = module_of(target, names) if target[0] == "hostel" else None
        if found and found != name_of(path):
            yield found


@pytest.mark.parametrize("path", [p for p in MODULES if rooms(p)[0] == "abi"], ids=name_of)
def test_abi_does_no_io(path: Path) -> None:
    used = {target[0] for target in imports(path, tree(path))} - {"hostel"}
    assert used <= ABI_MAY_IMPORT


def calls(path: Path, pattern: str) -> list[str]:
    found = (ast.unparse(node.func) for node in walk(tree(path)) if isinstance(node, ast.Call))
    return [name for name in found if re.fullmatch(pattern, name)]


def test_only_some_issue_ioctls() -> None:
    users = [name_of(path) for path in MODULES if calls(path, r"(fcntl\.)?ioctl")]
    assert [user for user in users if not user.startswith(IOCTL_USERS)] == []


def test_only_kvm_knows_kvm_requests() -> None:
    """The numbers of KVM's requests are in abi/; kvm/ alone uses them."""
    request = re.compile(
        r"\bKVM_(RUN|CREATE_\w+|SET_\w+|GET_\w+|IRQFD|IOEVENTFD|CHECK_EXTENSION)\b"
    )
    users = {name_of(path) for path in MODULES if request.search(code_of(path))}
    assert [user for user in users if not user.startswith(("abi/", "kvm/"))] == []


def code_of(path: Path) -> str:
    """The code without comments and docstrings, which may name what the code does not use."""
    root = tree(path)
    for node in ast.walk(root):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(root)


def test_only_host_starts_programs() -> None:
    pattern = r"subprocess\.\w+|os\.(posix_spawnp?|fork|forkpty|system|popen|exec\w+)"
    starters = [name_of(path) for path in MODULES if calls(path, pattern)]
    assert [starter for starter in starters if not starter.startswith(PROGRAM_STARTERS)] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(tree(path)), f"{path} has no docstring"


def test_files_read_in_one_sitting() -> None:
    files = [
        path
        for folder in ("src", "tests", "bench", "tools")
        for path in (TOP / folder).rglob("*.py")
    ]
    sizes = {str(path.relative_to(TOP)): len(path.read_text().splitlines()) for path in files}
    large = {name: size for name, size in sizes.items() if size > SIZE_LIMIT}
    assert not large, f"more than {SIZE_LIMIT} lines: {large}"


def functions() -> Iterator[tuple[str, int]]:
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{name_of(path)}:{node.name}", length


def test_functions_fit_on_a_screen() -> None:
    sizes = sorted(functions(), key=lambda pair: pair[1])
    assert sizes[len(sizes) // 2][1] < 10, "the median function has ten lines or more"
    assert [pair for pair in sizes if pair[1] > LONGEST] == []


def test_public_names() -> None:
    import hostel

    names = hostel.__all__
    assert sorted(names) == sorted(PUBLIC)
    assert [name for name in names if not hasattr(hostel, name)] == []


def test_importing_hostel_is_cheap() -> None:
    """`hostel --version` answers in Python's own time: heavy modules are imported by who needs them."""
    heavy = ["asyncio", "ctypes", "qemu", "msgspec", "lz4", "zstandard", "subprocess", "email"]
    program = f"import sys, hostel; print(*[name for name in {heavy} if name in sys.modules])"
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == []


def test_what_a_guests_kernel_waits_for() -> None:
    """Until it runs, Python imports little: what else the machine needs comes while it does."""
    later = ["asyncio", "difflib", "email", "lzma", "shutil", "socket", "subprocess", "traceback"]
    later += ["gettext", "inspect", "locale", "platform", "textwrap", "urllib.parse"]
    later += ["typing_extensions", "msgspec.inspect", "msgspec.json", "uuid", "decimal", "datetime"]
    later += ["click", "fnmatch", "ntpath", "hostel.cli.clicked"]
    later += ["hostel.devices", "hostel.guest", "hostel.qemu", "hostel.virtio", "hostel.soft"]
    later += ["hostel.abi.kvm_later", "hostel.abi.multiboot", "hostel.abi.pvh"]
    first = [
        "cli.entry",
        "cli.boot",
        "disks",
        "host.attaching",
        "host.descriptors",
        "host.runtime",
        "machine",
        "prepare",
    ]
    first += ["monitor", "monitor.board"]
    names = ", ".join(f"hostel.{name}" for name in first)
    program = (
        "import sys, hostel.cli.lean; hostel.cli.lean.import_packages('msgspec', 'pathlib')\n"
        f"import {names}; print(*[name for name in {later} if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == []


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by their base names: two alike, and none is run."""
    names = [path.name for path in (TOP / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
