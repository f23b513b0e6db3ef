"""Engine ``qemu``: the same plan on a QEMU process."""

from .engine import QemuEngine

__all__ = ["QemuEngine"]
