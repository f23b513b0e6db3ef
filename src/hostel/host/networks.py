"""A machine's networks once they have been asked for; what makes them is ``network.py``, which a machine
without any does not import."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .interface import Attachment


class Networks:
    """What is attached, until ``close``. A context manager.

    ``attach`` has asked for everything when it returns; ``attachments`` waits until all is there, and
    raises what went wrong. A keeper takes some 60 ms to start: there is other work to be done meanwhile.
    """

    def __init__(self) -> None:
        self._pending: list[Callable[[], Attachment]] = []
        self._attachments: tuple[Attachment, ...] | None = None
        self._undo = contextlib.ExitStack()
        self._rates: list[Callable[[], None]] = []
        """How to have the kernel keep the rates of NICs that have any; with ``attachments``."""
        self.notes: tuple[str, ...] = ()
        """What is not ours to mend and still keeps packets back, for the user; with ``attachments``."""

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """One for each NIC, in their order. The same each time."""
        if self._attachments is None:
            self._attachments = tuple(pending() for pending in self._pending)
        return self._attachments

    def hold_rates(self) -> None:
        """The host's kernel keeps the NICs' rates: for an engine that does not."""
        for hold in self._rates:
            hold()

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._undo.close()

    def __enter__(self) -> Networks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
