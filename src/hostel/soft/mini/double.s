# A fault while a fault is delivered: #DF on a stack of its own (SDM vol. 3A §6.15), and which pairs make one.
.include "long.inc"

.set NOWHERE, 0x40000000

main:
    movb $1, idt + 8 * 16 + 4   # #DF on IST1
    mov $NOWHERE, %ebx
    mov %rsp, %rbp
    mov $NOWHERE + 0x1000, %esp # a page fault that finds no stack
    attempt mov (%rbx), %eax
    mov %rbp, %rsp
    report_fault "#PF, then #PF"
    movb $0x0e, idt + 14 * 16 + 5
    attempt mov (%rbx), %eax    # its gate is not present: a contributory fault
    report_fault "#PF, then #NP"
    movb $0x8e, idt + 14 * 16 + 5
    xor %ecx, %ecx
    xor %edx, %edx
    movb $0x0e, idt + 0 * 16 + 5
    attempt div %ecx
    report_fault "#DE, then #NP"
    movb $0x8e, idt + 0 * 16 + 5
    movb $0x0e, idt + 6 * 16 + 5
    attempt ud2                 # #UD is benign: #NP alone
    report_fault "#UD, then #NP"
    movb $0x8e, idt + 6 * 16 + 5
    movw $0x70, idt + 6 * 16 + 2
    attempt ud2                 # a selector beyond the GDT
    report_fault "#UD, then #GP"
    movw $CODE, idt + 6 * 16 + 2
    attempt ud2
    report_fault "#UD"
    ret
