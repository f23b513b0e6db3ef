"""The command as a fixture."""

from __future__ import annotations

import pytest

from cli.hostel_command import Hostel, run_hostel


@pytest.fixture
def hostel() -> Hostel:
    return run_hostel
