# Calls: a recursion that doubles, and calls through a table.
.include "long.inc"

main:
    mov $DEPTH, %edi
    call fibonacci
    report "fibonacci"
    mov $ROUNDS, %rbp
    mov $1, %eax
1:  mov %eax, %ecx
    and $3, %ecx
    call *table(, %rcx, 8)
    dec %rbp
    jnz 1b
    report "through a table"
    ret

# rax = the number of calls that end the recursion of depth edi.
fibonacci:
    cmp $2, %edi
    jb 1f
    push %rdi
    dec %edi
    call fibonacci
    pop %rdi
    push %rax
    sub $2, %edi
    call fibonacci
    pop %rcx
    add %rcx, %rax
    ret
1:  mov $1, %eax
    ret

add_one:
    add $0x1001, %rax
    ret
turn:
    rol $9, %rax
    inc %rax
    ret
mix:
    imul $0x10dcd, %rax, %rax
    inc %rax
    ret
flip:
    not %rax
    shr $1, %rax
    ret

.data
    .balign 8
table: .quad add_one, turn, mix, flip
