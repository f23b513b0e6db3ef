# Context switches: PROCESSES address spaces with the same addresses, CR3 loaded for each in turn.
# KERNEL_GLOBAL 1: the kernel's pages are global (SDM vol. 3A §4.10.2.4) and outlive the load.
.include "long.inc"
.include "pages.inc"
.include "user.inc"

.set DATA_PAGE, USER_BASE + 0x100000

main:
    movq $on_end, handlers + 6 * 8
    .if KERNEL_GLOBAL
    call make_global
    .endif
    mov $PROCESSES, %esi
    call new_block
    mov %rax, %r12              # one page of data each
    call make_spaces
    mov $ROUNDS, %r13d
1:  xor %ebx, %ebx
2:  mov spaces(, %rbx, 8), %rax
    mov %rax, %cr3
    user_address %rdi, program
    xor %esi, %esi
    lea 1(%rbx), %edx
    call run_user
    movabs DATA_PAGE, %rax      # the kernel sees the process's page too
    add %rax, total
    inc %ebx
    cmp $PROCESSES, %ebx
    jne 2b
    dec %r13d
    jnz 1b
    mov total, %rax
    report "total"
    mov %r12, %rdi
    mov $PROCESSES * 4096, %esi
    call compare_data
    report "pages"
    ret

make_global:
    xor %ecx, %ecx
1:  orq $GLOBAL, boot_pd(, %rcx, 8)
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov %cr4, %rax
    or $0x80, %eax              # PGE
    mov %rax, %cr4
    ret

make_spaces:
    xor %ebx, %ebx
1:  call new_space
    mov %rax, spaces(, %rbx, 8)
    mov %rax, %rdi
    call map_user_code
    mov %rbx, %rdx
    shl $12, %rdx
    lea PRESENT + WRITABLE + USER(%r12, %rdx), %rdx
    movabs $DATA_PAGE, %rsi
    call map_page
    inc %ebx
    cmp $PROCESSES, %ebx
    jne 1b
    ret

on_end:
    jmp end_user

.section .user, "ax"
program:
    movabs $DATA_PAGE, %rsi
    mov $8, %ecx
1:  add %rdi, (%rsi)
    mov (%rsi), %rax
    add %rax, 8(%rsi, %rdi, 8)
    dec %ecx
    jnz 1b
    ud2

.bss
    .balign 8
spaces: .skip 8 * PROCESSES
total: .skip 8
