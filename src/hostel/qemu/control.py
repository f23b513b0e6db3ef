"""QMP, the JSON protocol that drives a QEMU process: a thread that listens, and calls from any other.

::

    our thread           the QMP thread (asyncio)
    ──────────           ────────────────────────
    start                import qemu.qmp        60 ms, while QEMU starts
    wait_up  ◄────────── connected              QEMU's main loop runs: its devices are there
    execute  ◄─────────► one command
                         events ──► on_event
    ended    ◄────────── QEMU closed its end
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hostel.errors import HelperError, MachineStopped

if TYPE_CHECKING:
    from qemu.qmp import EventListener, Message, QMPClient

ANSWER_SECONDS = 30.0

OnEvent = Callable[[str, dict[str, Any]], None]


class Control:
    """One QMP connection over a connected socket, which it owns."""

    def __init__(self, sock: socket.socket, on_event: OnEvent, *, hold: bool = False) -> None:
        """``hold``: the guest waits (``-S``) until we listen; then it may run."""
        self._sock = sock
        self._hold = hold
        self._on_event = on_event
        self._client: QMPClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hostel-qmp", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_up(self) -> bool:
        """Until QEMU answers; False if it ended instead."""
        self._up.wait()
        return self._client is not None

    def ended(self) -> None:
        """Return once QEMU has closed the connection and its last event has been delivered."""
        self._thread.join()

    def execute(self, command: str, **arguments: Any) -> Any:
        """One command and its answer."""
        loop, client = self._loop, self._client
        if loop is None or client is None or not self._thread.is_alive():
            raise MachineStopped("QEMU has ended")
        call = client.execute(command, arguments)
        try:
            return asyncio.run_coroutine_threadsafe(call, loop).result(ANSWER_SECONDS)
        except RuntimeError:  # the loop ended in between
            call.close()
            raise MachineStopped("QEMU has ended") from None
        except Exception as error:
            raise HelperError(f"QEMU did not do {command}: {error}") from None

    def _run(self) -> None:
        try:
            asyncio.run(self._listen())
        finally:
            self._up.set()

    async def _listen(self) -> None:
        from qemu.qmp import ConnectError, QMPClient

        client = QMPClient("hostel")
        client.logger.disabled = True  # what goes wrong is ours to say
        with client.listener() as events:
            try:
                await client.connect(self._sock)
            except ConnectError:  # QEMU ended first
                self._sock.close()
                return
            self._loop, self._client = asyncio.get_running_loop(), client
            if self._hold:
                await client.execute("cont")
            self._up.set()
            pump = asyncio.create_task(self._pump(events))
            await client.runstate_changed()
            pump.cancel()
            while not events.empty():
                self._deliver(await events.get())
        with contextlib.suppress(EOFError, OSError):
            await client.disconnect()

    async def _pump(self, events: EventListener) -> None:
        async for message in events:
            self._deliver(message)

    def _deliver(self, message: Message) -> None:
        data = message.get("data")
        self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
