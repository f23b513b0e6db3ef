"""``python -m hostel`` is the ``hostel`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
