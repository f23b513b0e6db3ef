# Memory: a stream of writes and reads, a copy, and accesses at random places.
.include "long.inc"

.set BUFFER, 0x400000
.set WORDS, KIB * 128

main:
    mov $ROUNDS, %rbp
    xor %ebx, %ebx
1:  mov $BUFFER, %edi           # write half of it in a row …
    mov $WORDS / 2, %rcx
    mov $0x9e3779b97f4a7c15, %rdx
    mov %rdx, %rax
2:  mov %rax, (%rdi)
    add %rdx, %rax
    add $8, %rdi
    dec %rcx
    jnz 2b
    mov $BUFFER, %esi           # … copy it into the other half
    mov $WORDS / 2, %rcx
    rep movsq
    mov $BUFFER, %esi           # read all
    mov $WORDS, %rcx
3:  add (%rsi), %rbx
    rol $1, %rbx
    add $8, %rsi
    dec %rcx
    jnz 3b
    mov $WORDS / 2, %rcx        # and change words all over it
4:  imul $1103515245, %rbx, %rax
    add $12345, %rax
    mov %rax, %rbx
    shr $16, %rax
    xor %edx, %edx
    mov $WORDS, %rsi
    div %rsi
    add %rbx, BUFFER(, %rdx, 8)
    dec %rcx
    jnz 4b
    dec %rbp
    jnz 1b
    mov %rbx, %rax
    report "read"
    mov $BUFFER, %edi
    mov $KIB * 1024, %rsi
    call compare_data
    report "left"
    ret
