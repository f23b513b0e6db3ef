"""Runs in a Linux guest: programs on both sides of AF_VSOCK. ``python3 vsock_peer.py VERB PORT …``"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading

HOST = 2  # VMADDR_CID_HOST
CHUNK = bytes(range(256)) * 256


def digest(port: int) -> None:
    """A server: answers the end of each stream with its length and checksum."""
    listener = socket.socket(socket.AF_VSOCK)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(200)
    print("listening", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=answer, args=(sock,)).start()


def answer(sock: socket.socket) -> None:
    with sock:
        seen, size = hashlib.sha256(), 0
        while data := sock.recv(1 << 17):
            seen.update(data)
            size += len(data)
        sock.sendall(f"{size} {seen.hexdigest()}\n".encode())


def send(port: int, count: int) -> None:
    """A client: so many chunks, the end, and what the host says to it."""
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.connect((HOST, port))
        for _ in range(count):
            sock.sendall(CHUNK)
        sock.shutdown(socket.SHUT_WR)
        print(sock.recv(100).decode(), end="")


def many(port: int, count: int) -> None:
    """Connections that are all open at the same time."""
    socks = [socket.socket(socket.AF_VSOCK) for _ in range(count)]
    for number, sock in enumerate(socks):
        sock.connect((HOST, port))
        sock.sendall(b"%04d" % number)
    echoed = sum(sock.recv(4, socket.MSG_WAITALL) == b"%04d" % at for at, sock in enumerate(socks))
    print(echoed)


def refused(port: int) -> None:
    try:
        socket.socket(socket.AF_VSOCK).connect((HOST, port))
    except ConnectionResetError:
        print("refused")


def cid() -> None:
    import fcntl  # IOCTL_VM_SOCKETS_GET_LOCAL_CID

    with open("/dev/vsock", "rb") as file:
        print(int.from_bytes(fcntl.ioctl(file, 0x7B9, bytes(4)), sys.byteorder))


if __name__ == "__main__":
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
    os._exit(0 if not sys.stdout.flush() else 1)
