# A trap after each instruction while RFLAGS.TF is 1 (SDM vol. 3B §17.3.1.4).
.include "long.inc"

main:
    movq $on_step, handlers + 1 * 8
    pushf
    orq $0x100, (%rsp)
    popf
    nop
    nop
    nop
    pushf
    andq $~0x100, (%rsp)
    popf
    mov steps, %rax
    report "single steps"
    ret

on_step:
    incq steps
    ret

.bss
    .balign 8
steps: .skip 8
