# System calls: ring 3 asks, ring 0 answers; by SYSCALL and SYSRET, or (GATE 1) by INT 0x80 and IRET.
.include "long.inc"
.include "pages.inc"
.include "user.inc"
.include "syscall.inc"

.set STACK_PAGE, USER_BASE + 0x100000

main:
    call enable_syscall
    movb $0xee, idt + 0x80 * 16 + 5             # DPL 3
    movq $on_syscall, handlers + 0x80 * 8
    call new_space
    mov %rax, %rdi
    call map_user_code
    mov $STACK_PAGE, %rsi
    call new_frame
    or $PRESENT + WRITABLE + USER, %rax
    mov %rax, %rdx
    call map_page
    mov %rdi, %cr3
    user_address %rdi, program
    mov $STACK_PAGE + 4096, %rsi
    mov $ROUNDS, %edx
    call run_user
    report "sum"
    mov calls, %rax
    report "calls"
    mov last_flags, %rax
    and $0x200, %eax
    report "interrupts in ring 3"
    ret

on_syscall:
    cmpq $0, FRAME_RAX(%rdi)
    je 1f
    incq calls
    mov FRAME_FLAGS(%rdi), %rax
    mov %rax, last_flags
    mov FRAME_RSI(%rdi), %rax
    lea 1(%rax, %rax, 2), %rax  # three times what was asked, and one
    mov %rax, FRAME_RAX(%rdi)
    ret
1:  mov FRAME_RDI(%rdi), %rax
    jmp end_user

.macro ask
    .if GATE
    int $0x80
    .else
    syscall
    .endif
.endm

.section .user, "ax"
program:
    mov %rdi, %rbx
    xor %ebp, %ebp
1:  mov $1, %eax
    mov %rbx, %rsi
    push %rbx
    ask
    pop %rdx
    cmp %rdx, %rbx              # our stack and registers are as they were
    jne 2f
    add %rax, %rbp
    dec %rbx
    jnz 1b
2:  xor %eax, %eax
    mov %rbp, %rdi
    ask

.bss
    .balign 8
calls: .skip 8
last_flags: .skip 8
