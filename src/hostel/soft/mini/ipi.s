# Interrupts between two processors: to one, to oneself, to all others, an NMI; priorities and the TPR.
.include "long.inc"
.include "apic.inc"
.include "smp.inc"

.set PING, 0x41
.set PONG, 0x40
.set LOW, 0x50
.set HIGH, 0x60
.set STOP, 0x42

main:
    movq $on_ping, handlers + PING * 8
    movq $on_pong, handlers + PONG * 8
    movq $on_stop, handlers + STOP * 8
    movq $on_low, handlers + LOW * 8
    movq $on_high, handlers + HIGH * 8
    movq $on_nmi, handlers + 2 * 8
    call enable_apic
    call start_cpus
    mov cpus_up, %eax
    report "processors"
    call ping_pong
    call to_self
    call priorities
    call task_priority
    call nmi
    mov $ICR_FIXED + ICR_TO_OTHERS + STOP, %esi
    xor %edi, %edi
    call send_ipi
1:  pause
    cmpq $0, stopped
    je 1b
    mov stopped, %rax
    report "stopped"
    ret

# CPU 1 answers each; CPU 0 sleeps until the answer is there.
ping_pong:
    mov $1, %ebx
1:  mov $ICR_FIXED + PING, %esi
    mov $1, %edi
    call send_ipi
2:  cli                         # nothing comes between the look and the HLT
    cmp %rbx, pongs
    je 3f
    sti
    hlt
    jmp 2b
3:  sti
    inc %ebx
    cmp $ROUNDS, %ebx
    jbe 1b
    cli
    mov pings, %rax
    report "pings"
    mov pongs, %rax
    report "pongs"
    ret

to_self:
    mov $ICR_FIXED + ICR_TO_SELF + LOW, %esi
    xor %edi, %edi
    call send_ipi
    call wait_interrupt
    mov order, %rax
    report "to self"
    ret

# Two wait while interrupts are off: the higher vector comes first.
priorities:
    movq $0, order
    mov $ICR_FIXED + ICR_TO_SELF + LOW, %esi
    xor %edi, %edi
    call send_ipi
    mov $ICR_FIXED + ICR_TO_SELF + HIGH, %esi
    xor %edi, %edi
    call send_ipi
1:  call wait_interrupt
    cmpq $0x100, order
    jb 1b
    mov order, %rax
    report "order"
    ret

# A TPR of 0x50 holds back 0x50 to 0x5f, and lets 0x60 pass; by CR8 too.
task_priority:
    movq $0, order
    mov $5, %eax
    mov %rax, %cr8
    apic_read APIC_TPR
    mov %eax, %eax
    report "task priority"
    mov $ICR_FIXED + ICR_TO_SELF + LOW, %esi
    xor %edi, %edi
    call send_ipi
    mov $ICR_FIXED + ICR_TO_SELF + HIGH, %esi
    xor %edi, %edi
    call send_ipi
    call wait_interrupt
    mov order, %rax
    report "passed"
    xor %eax, %eax
    mov %rax, %cr8
1:  call wait_interrupt
    cmpq $0x100, order
    jb 1b
    mov order, %rax
    report "and held back"
    ret

nmi:
    mov $ICR_NMI, %esi
    mov $1, %edi
    call send_ipi
1:  pause
    cmpq $0, nmis
    je 1b
    mov nmis, %rax
    report "nmi on"
    ret

# Interrupts on until `order` changes.
wait_interrupt:
    mov order, %rax
    sti
1:  pause
    cmp %rax, order
    je 1b
    cli
    ret

# CPU 1 sleeps; all that it does is in its handlers.
cpu_main:
1:  sti
    hlt
    jmp 1b

on_ping:
    lock incq pings
    end_of_interrupt
    mov $ICR_FIXED + PONG, %esi
    xor %edi, %edi
    jmp send_ipi

on_pong:
    incq pongs
    end_of_interrupt
    ret

.macro note vector:req
    mov order, %rax
    shl $8, %rax
    or $\vector, %rax
    mov %rax, order
    end_of_interrupt
    ret
.endm

on_low:
    note LOW
on_high:
    note HIGH

on_nmi:
    mov %rsp, %rax
    and $-STACK_SIZE, %rax
    mov (%rax), %rax
    mov %rax, nmis
    ret

on_stop:
    end_of_interrupt
    movq $1, stopped
    cli
1:  hlt
    jmp 1b

.bss
    .balign 8
pings: .skip 8
pongs: .skip 8
order: .skip 8
nmis: .skip 8
stopped: .skip 8
