# A fault without an IDT: a double fault without one, and the processor shuts down (SDM vol. 3A §6.15).
.include "long.inc"

main:
    say "no way back"
    newline
    lidt nothing
    ud2

.data
nothing: .word 0
    .quad 0
