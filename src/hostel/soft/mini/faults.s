# Exceptions through a guest's own IDT: vector, error code, CR2, and where they return to.
.include "long.inc"

.set NOWHERE, 0x40000000        # 1 GiB: canonical, not mapped
.set BEYOND, 0x0000800000000000 # not canonical

main:
    xor %edx, %edx
    xor %ecx, %ecx
    mov $7, %eax
    attempt div %ecx
    report_fault "divide"
    attempt ud2
    report_fault "undefined"
    mov $NOWHERE, %ebx
    attempt mov 8(%rbx), %eax
    report_fault "read nowhere"
    attempt mov %eax, 16(%rbx)
    report_fault "write nowhere"
    attempt call *%rbx
    add $8, %rsp                # the return address
    report_fault "run nowhere"
    mov $BEYOND, %rbx
    attempt mov (%rbx), %eax
    report_fault "read not canonical"
    mov $0x78, %eax             # a selector beyond the GDT
    attempt mov %eax, %es
    report_fault "selector"
    mov $0xfff0, %eax
    attempt ltr %ax
    report_fault "task"
    mov %rsp, %rbp
    lea 0x100(%rbx), %rsp
    movb $1, idt + 12 * 16 + 4  # #SS, and what else may come of it: IST1, for the stack is bad
    movb $1, idt + 13 * 16 + 4
    attempt push %rax
    mov %rbp, %rsp
    report_fault "stack"
    ret
