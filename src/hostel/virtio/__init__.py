"""Virtio: queue, transports, devices and data planes."""
