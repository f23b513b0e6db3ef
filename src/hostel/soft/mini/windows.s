# When an interrupt that waits is taken: the shadow of STI, HLT after STI, POPF, NMIs inside of an NMI.
.include "long.inc"
.include "apic.inc"

.set VECTOR, 0x50

main:
    movq $on_interrupt, handlers + VECTOR * 8
    movq $on_nmi, handlers + 2 * 8
    call enable_apic
    call ask
    mov $10, %ecx
1:  sti                         # the instruction behind STI comes first, and it is CLI
    cli
    dec %ecx
    jnz 1b
    mov taken, %rax
    report "sti, cli"
    sti
    nop                         # here
    cli
    mov taken, %rax
    report "sti, nop, cli"
    call ask
    sti
    hlt                         # it is taken in the HLT, which then is over
behind_hlt:
    cli
    mov taken, %rax
    report "sti, hlt"
    mov at, %rax
    sub $behind_hlt, %rax
    report "behind hlt"
    call ask
    pushf
    orq $0x200, (%rsp)
    popf                        # without a shadow
before:
    cli
    mov taken, %rax
    report "popf"
    mov at, %rax
    sub $before, %rax
    report "before its cli"
    mov $ICR_NMI, %esi
    xor %edi, %edi
    call send_ipi
1:  pause
    cmpq $2, nmis               # the handler asks for a second one
    jne 1b
    mov nmis, %rax
    report "nmis"
    mov deepest, %rax
    report "deep at once"
    ret

# An interrupt to oneself, which waits while interrupts are off.
ask:
    mov $ICR_FIXED + ICR_TO_SELF + VECTOR, %esi
    xor %edi, %edi
    jmp send_ipi

on_interrupt:
    incq taken
    mov FRAME_RIP(%rdi), %rax
    mov %rax, at
    end_of_interrupt
    ret

# NMIs are blocked until IRET (SDM vol. 3A §6.7.1): the second one comes after this one.
on_nmi:
    incq nmis
    incq depth
    mov depth, %rax
    cmp deepest, %rax
    jbe 1f
    mov %rax, deepest
1:  cmpq $1, nmis
    jne 3f
    mov $ICR_NMI, %esi
    xor %edi, %edi
    call send_ipi
    mov $100, %ecx
2:  pause
    dec %ecx
    jnz 2b
3:  decq depth
    ret

.bss
    .balign 8
taken: .skip 8
at: .skip 8
nmis: .skip 8
depth: .skip 8
deepest: .skip 8
