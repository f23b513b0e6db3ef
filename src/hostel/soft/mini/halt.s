# HLT with interrupts off, and nothing that could wake it: the host sees the halt, if it looks.
.include "long.inc"

main:
    say "halting with interrupts off: nothing wakes this processor, only the host can end it"
    newline
    cli
    hlt
    say "awake"
    newline
    ret
