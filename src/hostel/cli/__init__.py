"""The command: one file per verb, each imported only when it is called.

``main`` answers ``--version`` before anything else is imported: that is measured
(``bench/startup.py``).
"""

import contextlib
import sys


def main() -> int:
    """The entry point of the ``hostel`` command; returns the exit code.

    Until the command line can clean up, Ctrl-C just ends it: Python's own handler would show a traceback
    of whatever is being imported.
    """
    if sys.argv[1:] == ["--version"]:
        from hostel.version import VERSION

        with contextlib.suppress(OSError):  # the long way says what is wrong
            print(f"hostel {VERSION}", flush=True)
            return 0
    import gc
    import signal

    gc.set_threshold(50_000)  # importing makes no garbage: looking for it is a tenth of the start
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .lean import import_packages

    import_packages("msgspec", "pathlib")
    from .entry import command_line

    return command_line(sys.argv[1:])
