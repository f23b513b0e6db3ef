# Software interrupts in ring 0: they return behind the instruction; a gate with an IST entry changes the stack.
.include "long.inc"

main:
    attempt int3
    report_fault "breakpoint"
    attempt int $0x42
    report_fault "int 42"
    call on_other_stack
    ret

# A handler with an IST entry runs on that stack, and returns to the one before.
on_other_stack:
    movq $on_ist, handlers + 0x43 * 8
    movb $1, idt + 0x43 * 16 + 4
    mov %rsp, %rbx
    int $0x43
    sub %rsp, %rbx
    mov %rbx, %rax
    report "stack moved by"
    mov ist_used, %rax
    report "on IST1"
    ret

on_ist:
    lea fault_stacks + 0x1000, %rax
    sub %rsp, %rax
    cmp $0x1000, %rax
    setb ist_used
    ret

.bss
    .balign 8
ist_used: .skip 8
