"""What a guest's node numbers stand for: files and directories below one root, by where they are.

::

    Node 7  =  "name" in Node 3  =  "sub" in Node 1  =  the root, an open descriptor
               └ device, inode and type as they were when the guest looked it up

Rules:

* **Confined by construction.** A name is one component, checked (``checked_name``); it is only ever used
  below the descriptor of a directory, and never followed (O_NOFOLLOW). ``..`` is answered from this table,
  never asked of the host. So there is no path that a link, or a rename at the wrong moment, could bend.
* **No descriptor for each node.** A guest remembers hundreds of thousands of files. Directories in use have
  a descriptor, the least recently used is closed; what has none is opened again by its names, and must
  still be the same device, inode and type: else ESTALE, and the guest's kernel looks it up anew.
* What the guest removes while it still uses it has no name any more: it is *pinned*, its descriptor stays.
* The table is bounded by what a guest of this size could remember. All that is wrong is an OSError whose
  number goes to the guest.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from errno import EINVAL, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENOENT, ENOTDIR, ESTALE
from typing import NoReturn

from hostel.abi.fuse import ROOT_ID

NAME_MAX = 255
MAX_DEPTH = 4096
"""Renames on the host may make a circle of what we remember."""

PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

Key = tuple[int, int, int]


def refuse(number: int) -> NoReturn:
    """End a request with this error."""
    raise OSError(number, os.strerror(number))


def checked_name(name: bytes) -> bytes:
    """One component of a path, which leads nowhere but to a child."""
    if len(name) > NAME_MAX:
        refuse(ENAMETOOLONG)
    if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
        refuse(EINVAL)
    return name


def key_of(found: os.stat_result) -> Key:
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


class Node:
    """``fd`` is an O_PATH descriptor, or -1."""

    __slots__ = ("children", "fd", "id", "key", "lookups", "name", "parent", "pinned")

    def __init__(self, number: int, key: Key, parent: Node | None, name: bytes) -> None:
        self.id = number
        self.key = key
        self.parent = parent
        self.name = name
        self.lookups = 0
        """How often the guest was told of it, less what it forgot."""
        self.children = 0
        """Nodes whose place is in it."""
        self.fd = -1
        self.pinned = False


class NodeTable:
    """``root`` is a directory's descriptor, and belongs to the table."""

    def __init__(self, root: int, *, most_nodes: int, most_open: int) -> None:
        self.root = Node(ROOT_ID, key_of(os.stat(root)), None, b"")
        self.root.fd, self.root.pinned = root, True
        self._most_nodes = most_nodes
        self._most_open = max(8, most_open)
        self._next = ROOT_ID + 1
        self._by_id = {ROOT_ID: self.root}
        self._by_key = {self.root.key: self.root}
        self._open: OrderedDict[int, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def open_count(self) -> int:
        return len(self._open)

    def get(self, number: int) -> Node:
        node = self._by_id.get(number)
        return node if node is not None else refuse(ESTALE)

    # -- what the guest knows -----------------------------------------------------------------

    def remember(self, parent: Node, name: bytes, found: os.stat_result) -> Node:
        """The guest is told of ``name`` in ``parent``."""
        key = (found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode))
        node = self._by_key.get(key)
        if node is None:
            if len(self._by_id) >= self._most_nodes:
                refuse(ENFILE)
            node = Node(self._next, key, parent, name)
            self._next += 1
            parent.children += 1
            self._by_id[node.id] = self._by_key[key] = node
        elif node.parent is not parent or node.name != name:
            self.move(node, parent, name)
        node.lookups += 1
        return node

    def forget(self, number: int, count: int) -> None:
        """The guest dropped ``count`` of what it was told; more than that is all of it."""
        node = self._by_id.get(number)
        if node is not None:
            node.lookups = max(0, node.lookups - count)
            self._drop(node)

    def find(self, found: os.stat_result) -> Node | None:
        return self._by_key.get(key_of(found))

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        """Its place is another now."""
        if node.parent is None:
            return
        before, node.parent, node.name = node.parent, parent, name
        parent.children += 1
        before.children -= 1
        self._drop(before)

    @contextlib.contextmanager
    def losing_its_name(self, found: os.stat_result) -> Iterator[Node | None]:
        """Keep hold of what is found there, if the guest knows it, and if that is its last name."""
        node = self._by_key.get(key_of(found))
        last = found.st_nlink == 1 or stat.S_ISDIR(found.st_mode)
        if node is None or node.pinned or not last:
            yield node
            return
        self._pin(node)
        try:
            yield node
        except OSError:
            self._unpin(node)
            raise

    def _pin(self, node: Node) -> None:
        """As far as the process has a descriptor left."""
        with contextlib.suppress(OSError):
            if node.fd < 0:
                node.fd = self._find(node)
            self._open.pop(node.id, None)
            node.pinned = True

    def _unpin(self, node: Node) -> None:
        if node.pinned:
            os.close(node.fd)
            node.fd, node.pinned = -1, False

    def clear(self) -> None:
        """The guest starts anew."""
        for node in self._by_id.values():
            if node is not self.root and node.fd >= 0:
                os.close(node.fd)
        self._open.clear()
        self.root.children = self.root.lookups = 0
        self._by_id = {ROOT_ID: self.root}
        self._by_key = {self.root.key: self.root}

    def close(self) -> None:
        self.clear()
        os.close(self.root.fd)

    def _drop(self, node: Node) -> None:
        while node.parent is not None and not node.lookups and not node.children:
            self._by_id.pop(node.id, None)
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            self._open.pop(node.id, None)
            if node.fd >= 0:
                os.close(node.fd)
                node.fd = -1
            node.parent.children -= 1
            node = node.parent

    # -- where it is on the host --------------------------------------------------------------

    def directory(self, node: Node) -> int:
        """An O_PATH descriptor of a directory, the table's own: good until the next but six calls."""
        if node.fd >= 0:
            if not node.pinned:
                self._open.move_to_end(node.id)
            elif not stat.S_ISDIR(node.key[2]):
                refuse(ENOTDIR)
            return node.fd
        if not stat.S_ISDIR(node.key[2]):
            refuse(ENOTDIR)
        fd = self._find(node)
        while len(self._open) >= self._most_open:
            self._close_oldest()
        node.fd = fd
        self._open[node.id] = node
        return fd

    def stat(self, node: Node) -> os.stat_result:
        if node.fd >= 0:
            return os.stat(node.fd)
        parent = node.parent
        assert parent is not None  # only the root has none, and it is open
        try:
            found = os.stat(node.name, dir_fd=self.directory(parent), follow_symlinks=False)
        except FileNotFoundError:
            refuse(ESTALE)
        if key_of(found) != node.key:
            refuse(ESTALE)
        return found

    @contextlib.contextmanager
    def opened(self, node: Node) -> Iterator[int]:
        """An O_PATH descriptor of any node, for a moment."""
        if node.fd >= 0:
            yield node.fd
            return
        fd = self._find(node)
        try:
            yield fd
        finally:
            os.close(fd)

    def make_room(self) -> bool:
        """Close half of the directories: the process has no descriptor left. False: there were none."""
        count = (len(self._open) + 1) // 2
        for _ in range(count):
            self._close_oldest()
        return count > 0

    def _close_oldest(self) -> None:
        _, node = self._open.popitem(last=False)
        os.close(node.fd)
        node.fd = -1

    def _find(self, node: Node) -> int:
        """Open it by its names, and look whether it is still the same."""
        while True:
            try:
                return self._walk(node)
            except OSError as error:
                if error.errno in (ENOENT, ENOTDIR, ELOOP):
                    refuse(ESTALE)
                if error.errno not in (EMFILE, ENFILE) or not self.make_room():
                    raise

    def _walk(self, node: Node) -> int:
        steps: list[Node] = []
        at = node
        while at.fd < 0:
            steps.append(at)
            if len(steps) > MAX_DEPTH or at.parent is None:
                refuse(ESTALE)
            at = at.parent
        fd = -1
        try:
            for step in reversed(steps):
                only = 0 if step is node else os.O_DIRECTORY
                following = os.open(step.name, PATH | only, dir_fd=at.fd if fd < 0 else fd)
                if fd >= 0:
                    os.close(fd)
                fd = following
            if key_of(os.stat(fd)) != node.key:
                refuse(ESTALE)
        except OSError:
            if fd >= 0:
                os.close(fd)
            raise
        return fd
