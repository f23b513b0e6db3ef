"""Record and replay: the same machine again, to the same console bytes and the same final state.

::

    guest ──► whatever depends on the outside is a question ──► Inputs ─┬─ Recorder: asks, writes the answer
                                                                        └─ Replayer: reads the answer
    log.py     the file        inputs.py   the questions, and where they were asked
    digest.py  memory and registers, as a few bytes

All else follows from the guest: one thread at a time runs it, in a fixed order, and time is instructions. So
questions come in the same order each time, and a question's number says when an answer came.
"""
