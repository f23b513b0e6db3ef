"""What a machine's description may be, from keywords."""

from __future__ import annotations

from typing import Any

import pytest

from hostel import Machine, SpecError, Volume


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nics": ["nat"]}, "nics must hold Nic values, not 'nat'"),
        ({"volumes": ["/a:/b"]}, "volumes must hold Volume values, not '/a:/b'"),
        ({"disks": [5]}, "disks must hold Disk values, not 5"),
        ({"publish": [80]}, "publish must hold Publish values, not 80"),
        ({"tmpfs": [b"/x"]}, "tmpfs must hold str values"),
        ({"tmpfs": "/x"}, "tmpfs must be a tuple, not '/x'"),
        ({"volumes": Volume(source="/a", target="/b")}, "volumes must be a tuple"),
        ({"memory": "1G"}, "memory must be of type int, not '1G'"),
        ({"memory": 3e9}, "memory must be of type int"),
        ({"cpus": True}, "cpus must be of type int, not True"),
        ({"kernel": None}, "kernel must be of type str, not None"),
        ({"root": "/srv"}, "root must be of type Root, not '/srv'"),
        ({"engine": "xen"}, "engine must be one of auto, kvm, qemu, soft, not 'xen'"),
        ({"transport": "usb"}, "transport must be one of pci, mmio"),
        ({"vsock": True}, "vsock must be one of none, auto, vhost, python, not True"),
        ({"on_reboot": "no"}, "on_reboot must be one of restart, stop"),
        ({"volumes": [Volume(source="/etc", target="/proc")]}, "nothing can be mounted over"),
        ({"tmpfs": ["/dev/"]}, "the guest's /dev; no program would work in it"),
        ({"tmpfs": ["/"]}, "nothing can be mounted over the guest's root"),
    ],
)
def test_parts_of_another_kind(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Machine(**fields)
