"""The service OS of ``hostel lab models``: a process that has the device, and does what it is asked.

A request is four bytes: the port (little-endian), how many bytes follow (1), a zero; then the bytes. The
answer is one byte, when the device has them. At the end of the requests it says how often it was switched
to: its voluntary context switches, eight bytes.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
import sys

REQUEST = struct.Struct("<HBx")
SWITCHES = struct.Struct("<Q")
END = 0xFFFF
"""A request to this port is the last one."""


def serve(requests: socket.socket, device: int) -> None:
    while True:
        port, size = REQUEST.unpack(_exactly(requests, REQUEST.size))
        if port == END:
            used = resource.getrusage(resource.RUSAGE_SELF)
            requests.sendall(SWITCHES.pack(used.ru_nvcsw))
            return
        os.write(device, _exactly(requests, size))
        requests.sendall(b"\0")


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise SystemExit("the hypervisor has gone")
        data += part
    return data


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
