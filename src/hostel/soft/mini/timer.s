# The local APIC's timer: once, and at intervals; the processor sleeps in between (HLT).
.include "long.inc"
.include "apic.inc"

.set ONCE, 0x40
.set EVERY, 0x41

main:
    movq $on_once, handlers + ONCE * 8
    movq $on_every, handlers + EVERY * 8
    call enable_apic
    mov $0xb, %eax              # counts each tick of its clock
    apic_write APIC_DIVIDE
    mov $ONCE, %eax
    apic_write APIC_TIMER
    mov $INTERVAL, %eax
    apic_write APIC_INITIAL_COUNT
1:  cli
    cmpq $0, once
    jne 2f
    sti
    hlt
    jmp 1b
2:  apic_read APIC_CURRENT_COUNT
    mov %eax, %eax
    report "left of it"
    mov $0x20000 + EVERY, %eax  # periodic
    apic_write APIC_TIMER
    mov $INTERVAL, %eax
    apic_write APIC_INITIAL_COUNT
3:  cli
    cmpq $TICKS, every
    jae 4f
    sti
    hlt
    jmp 3b
4:  mov $0x10000, %eax          # masked
    apic_write APIC_TIMER
    xor %eax, %eax
    apic_write APIC_INITIAL_COUNT
    mov once, %rax
    report "once"
    mov every, %rax
    report "ticks"
    ret

on_once:
    incq once
    end_of_interrupt
    ret

on_every:
    cmpq $TICKS, every
    jae 1f
    incq every
1:  end_of_interrupt
    ret

.bss
    .balign 8
once: .skip 8
every: .skip 8
