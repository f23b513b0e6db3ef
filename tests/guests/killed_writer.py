"""A VMM that is there to be killed: its driver writes, flushes, and says which block is safe now.

``python killed_writer.py IMAGE FOLDER``: one line a block, its number, until the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hostel.abi import virtio as abi
from hostel.host.inputs import checked_disks
from hostel.host.storage import Daemon
from hostel.spec import Disk as DiskSpec
from hostel.virtio.block import Block
from hostel.virtio.device import VirtioDevice
from hostel.virtio.vhost_user_blk import VhostUserBlk
from virtio.block_driver import OK, disk_on
from virtio.rig import Rig

BLOCKS = 2000


def device(rig: Rig, image: Path, folder: Path) -> VirtioDevice:
    if image.suffix == ".raw":
        return Block(rig.loop, str(image), name="disk")
    (spec,) = checked_disks((DiskSpec(path=str(image)),))
    daemon = Daemon(spec, folder / "disk0.sock")
    daemon.wait_up()
    return VhostUserBlk(rig.loop, daemon.socket, name="disk")


def main() -> None:
    rig = Rig()
    disk = disk_on(rig, device(rig, Path(sys.argv[1]), Path(sys.argv[2])))
    for turn in range(BLOCKS):
        assert disk.write(turn * 8, bytes([turn % 251 + 1]) * 4096) == OK
        assert disk.request(abi.BLK_T_FLUSH)[0] == OK
        print(turn, flush=True)


main()
