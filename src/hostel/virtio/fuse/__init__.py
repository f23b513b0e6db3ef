"""A FUSE server: a directory of this host as a file system of a guest (virtio 1.2 §5.11).

::

    virtqueue ─► session ─► names · attributes · files · directories ─► nodes ─► the host's files
                 (request)                    (filesystem)

``device.py`` serves the virtqueues, to a machine in another process.
"""

from .device import serve
from .filesystem import FileSystem, Settings
from .request import FuseFault
from .session import Session

__all__ = ["FileSystem", "FuseFault", "Session", "Settings", "serve"]
