# Arithmetic and branches, hardly any memory.
.include "long.inc"

main:
    mov $ROUNDS, %rcx
    mov $0x0123456789abcdef, %rbx
    mov $0x2545f4914f6cdd1d, %rdi
    xor %esi, %esi
1:  mov %rbx, %rax              # xorshift64*
    shl $13, %rax
    xor %rax, %rbx
    mov %rbx, %rax
    shr $7, %rax
    xor %rax, %rbx
    mov %rbx, %rax
    shl $17, %rax
    xor %rax, %rbx
    mov %rbx, %rax
    imul %rdi, %rax
    add %rax, %rsi
    rol $7, %rsi
    bt $3, %rax
    jnc 2f
    not %rsi
2:  dec %rcx
    jnz 1b
    mov %rsi, %rax
    report "mixed"
    xor %edx, %edx
    mov %rsi, %rax
    mov $1000003, %ebx
    div %rbx
    report "quotient"
    mov %rdx, %rax
    report "remainder"
    ret
