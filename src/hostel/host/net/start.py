"""Starts a network's keeper as nobody's child: ``python -IS start.py LISTENER LOCK FOLDER KIND TARGET``.

A program of its own, because the keeper runs without site-packages: reading them takes longer than all
that it needs.
"""

import os
import sys

if os.fork():
    os._exit(0)

sys.path.insert(0, __file__.rpartition("/hostel/")[0])

from hostel.host.net.keeper import main

main(sys.argv[1:])
