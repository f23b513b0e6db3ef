"""``hostel`` as a person runs it: the installed command, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTEL = str(Path(sys.executable).with_name("hostel"))

Result = subprocess.CompletedProcess[bytes]
Hostel = Callable[..., Result]


def run_hostel(*arguments: str, **options: Any) -> Result:
    """``hostel ARG…`` to its end; standard input is empty unless given."""
    options = {"input": b"", "timeout": 120, **options}
    return subprocess.run([HOSTEL, *arguments], capture_output=True, check=False, **options)
