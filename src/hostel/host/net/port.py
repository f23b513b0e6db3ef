"""Ports of the host that are to be published."""

from __future__ import annotations

import socket

from hostel.errors import UserError


def reserve(address: str, port: int, protocol: str) -> socket.socket:
    """Hold a port of the host, so that nobody else takes it; ``UserError`` if it cannot be had."""
    try:
        return _held(address, port, protocol)
    except OSError as error:
        raise UserError(
            f"port {port}/{protocol} of {address or 'this host'} cannot be published: "
            f"{error.strerror}",
            cure="choose another port of the host",
        ) from None


def _held(address: str, port: int, protocol: str) -> socket.socket:
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET, kind)
    try:
        if protocol == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(1)
    except BaseException:
        sock.close()
        raise
    return sock
