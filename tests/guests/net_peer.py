"""The guest's end of a TCP transfer: ``net_peer.py send|receive HOST PORT``. It prints the digest.

``send``: SIZE bytes of a pattern, half-closed; ``receive``: all that comes.
"""

from __future__ import annotations

import hashlib
import socket
import sys

SIZE = 4 << 20
CHUNK = bytes(range(256)) * 256


def main() -> None:
    way, host, port = sys.argv[1:]
    digest = hashlib.sha256()
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        if way == "send":
            for _ in range(SIZE // len(CHUNK)):
                sock.sendall(CHUNK)
                digest.update(CHUNK)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)  # the host has it all
        else:
            while part := sock.recv(1 << 16):
                digest.update(part)
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
