# HLT with interrupts off, and nothing that could wake it: the host sees the halt.
.include "long.inc"

main:
    say "halting"
    newline
    cli
    hlt
    say "awake"
    newline
    ret
