# Page-table churn: map, use, unmap; the next round puts other frames behind the same addresses.
.include "long.inc"
.include "pages.inc"

main:
    call new_space
    mov %rax, %rdi
    mov %rax, %cr3
    mov $PAGES, %esi
    call new_block
    mov %rax, %r12              # the frames
    xor %r13d, %r13d            # the round
    xor %r14d, %r14d            # what was read
1:  call map_all
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
2:  mov (%rsi), %rax            # what a round before left in this frame
    add %rax, %r14
    rol $3, %r14
    lea (%rax, %r13), %rax
    add %rcx, %rax
    mov %rax, (%rsi)
    mov %rax, 4088(%rsi)
    add $4096, %rsi
    dec %ecx
    jnz 2b
    call unmap_all
    inc %r13
    cmp $ROUNDS, %r13
    jne 1b
    mov %r14, %rax
    report "read"
    movabs $USER_BASE, %rbx
    attempt mov (%rbx), %eax
    report_fault "after the last"
    mov %r12, %rdi
    mov $PAGES * 4096, %esi
    call compare_data
    report "left"
    ret

# Page i of round r is frame (i + r) % PAGES.
map_all:
    mov $USER_BASE, %rsi
    mov %r13, %rax
    xor %edx, %edx
    mov $PAGES, %ebx
    div %rbx
    mov %rdx, %rbx
    mov $PAGES, %ecx
1:  mov %rbx, %rdx
    shl $12, %rdx
    lea PRESENT + WRITABLE(%r12, %rdx), %rdx
    call map_page
    add $4096, %rsi
    inc %ebx
    cmp $PAGES, %ebx
    jne 2f
    xor %ebx, %ebx
2:  dec %ecx
    jnz 1b
    ret

unmap_all:
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
1:  call unmap_page
    add $4096, %rsi
    dec %ecx
    jnz 1b
    ret
