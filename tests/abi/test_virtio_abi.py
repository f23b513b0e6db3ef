"""The virtio and PCI layouts against the C headers, by a compiled probe."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from abi.c_probe import evaluate
from hostel.abi import pci, tun, virtio, virtio_net
from hostel.abi.record import Record

HEADERS = """
virtio_config virtio_ids virtio_ring virtio_pci virtio_mmio virtio_blk virtio_console virtio_fs pci_regs
virtio_balloon virtio_vsock virtio_net if_tun
"""
OURS_ALONE = {
    # Not in a header: they come from the text of the specification (§4.1.2, §4.2.2, §2.7, §5.2).
    "DESC_ALIGN",
    "AVAIL_ALIGN",
    "USED_ALIGN",
    "QUEUE_SIZE_MAX",
    "RING_HEADER_SIZE",
    "PCI_VENDOR",
    "PCI_DEVICE_BASE",
    "MMIO_MAGIC",
    "BLK_SECTOR",
    "VSOCK_CID_HOST",
    "VSOCK_F_STREAM",
    "CONFIG_SIZE",
    "FUNCTIONS",
    "DEVICES",
    "MSIX_ENTRY",
}
MODULES = ((virtio, "VIRTIO_"), (pci, "PCI_"), (virtio_net, "VIRTIO_NET_"), (tun, ""))
C_NAMES = {
    "DESC_F_NEXT": "VRING_DESC_F_NEXT",
    "DESC_F_WRITE": "VRING_DESC_F_WRITE",
    "DESC_F_INDIRECT": "VRING_DESC_F_INDIRECT",
    "AVAIL_F_NO_INTERRUPT": "VRING_AVAIL_F_NO_INTERRUPT",
    "USED_F_NO_NOTIFY": "VRING_USED_F_NO_NOTIFY",
    "CONSOLE_DEVICE_READY": "VIRTIO_CONSOLE_DEVICE_READY",
}


def numbers(module: ModuleType, prefix: str) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if name.isupper() and isinstance(value, int) and name not in OURS_ALONE:
            yield C_NAMES.get(name, prefix + name), value


def all_numbers() -> dict[str, int]:
    return dict(pair for module, prefix in MODULES for pair in numbers(module, prefix))


def records() -> Iterator[Record]:
    for name, value in (*vars(virtio).items(), *vars(virtio_net).items()):
        if isinstance(value, Record) and name not in OURS_ALONE:
            yield value


@pytest.fixture(scope="module")
def c_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Every expression below, as the C compiler sees it."""
    names = list(all_numbers())
    for record in records():
        names.append(f"sizeof(struct {record.c_name})")
        names += [f"offsetof(struct {record.c_name}, {field})" for field in record.offsets]
    headers = [*(f"linux/{header}.h" for header in HEADERS.split()), "sys/ioctl.h"]
    return evaluate(names, headers, tmp_path_factory.mktemp("probe"))


def test_constants(c_values: dict[str, int]) -> None:
    ours = all_numbers()
    assert len(ours) > 100
    assert ours == {name: c_values[name] for name in ours}


@pytest.mark.parametrize("record", list(records()), ids=lambda record: record.c_name)
def test_structures(c_values: dict[str, int], record: Record) -> None:
    name = record.c_name
    assert record.size == c_values[f"sizeof(struct {name})"]
    for field, offset in record.offsets.items():
        assert offset == c_values[f"offsetof(struct {name}, {field})"], field
