# Long mode, and a word on the console.
.include "long.inc"

main:
    say "hello from 64-bit mode"
    newline
    mov %cr0, %rax
    and $0x80000001, %eax       # PG, PE
    report "cr0"
    mov %cs, %eax
    report "cs"
    mov $0x0123456789abcdef, %rax
    report "wide"
    ret
