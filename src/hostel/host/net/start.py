"""Starts a network's keeper as nobody's child: ``python -IS start.py LISTENER LOCK FOLDER KIND TARGET``.

A program of its own, because the keeper runs without site-packages: reading them takes longer than all
that it needs.
"""

import os
import sys

if os.fork():
    os._exit(0)

sys.path.insert(0, os.path.abspath(__file__).rpartition("/hostel/")[0])
os.chdir("/")  # whatever is mounted where the first machine was started can be unmounted

from hostel.host.net.keeper import main  # noqa: E402

main(sys.argv[1:])
