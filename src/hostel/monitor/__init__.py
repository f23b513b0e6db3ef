"""Engines ``kvm`` and ``soft``: the machine, wired.

::

    Monitor   one machine, from start to its ending; memory, console, agent, event loop
      Board     one power-on: VM, buses, devices, vCPUs; a reset throws it away and makes a new one
        SEATS     the table of the devices that sit at fixed addresses
"""

from .monitor import Monitor

__all__ = ["Monitor"]
