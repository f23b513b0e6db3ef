# What ring 3 may not do: each privileged instruction and each page of the kernel's is a fault.
.include "long.inc"
.include "pages.inc"
.include "user.inc"

.set STACK_PAGE, USER_BASE + 0x100000
.set READ_ONLY_PAGE, USER_BASE + 0x200000
.set NX_PAGE, USER_BASE + 0x300000

main:
    movq $on_user_fault, handlers + 13 * 8
    movq $on_user_fault, handlers + 14 * 8
    movq $on_user_fault, handlers + 6 * 8
    call new_space
    mov %rax, %rdi
    call map_user_code
    call new_frame
    lea PRESENT + WRITABLE + USER(%rax), %rdx
    mov $STACK_PAGE, %rsi
    call map_page
    call new_frame
    lea PRESENT + USER(%rax), %rdx
    mov $READ_ONLY_PAGE, %rsi
    call map_page
    call new_frame
    lea PRESENT + WRITABLE + USER(%rax), %rdx
    bts $63, %rdx
    mov $NX_PAGE, %rsi
    call map_page
    mov %rdi, %cr3
    xor %ebp, %ebp
1:  mov tries(, %rbp, 8), %rdi
    test %rdi, %rdi
    jz 2f
    mov $STACK_PAGE + 4096, %rsi
    mov $RESULT_PAGE, %edx      # the kernel's
    call run_user
    mov names(, %rbp, 8), %rax
    push %rax
    call put_text
    say ": "
    call put_fault
    inc %ebp
    jmp 1b
2:  ret

# What ends a try that did not fault is #UD.
on_user_fault:
    mov FRAME_VECTOR(%rdi), %rax
    mov %rax, fault_vector
    cmp $6, %eax
    jne 1f
    movq $-1, fault_vector
1:  mov FRAME_ERROR(%rdi), %rax
    mov %rax, fault_error
    xor %eax, %eax
    cmpl $14, FRAME_VECTOR(%rdi)
    jne 1f
    mov %cr2, %rax
1:  mov %rax, fault_address
    mov FRAME_CS(%rdi), %eax
    cmp $USER_CODE, %eax
    jne unexpected
    jmp end_user

.macro try name:req, insn:vararg
    .section .user, "ax"
.Ltry\@:
    mov $0x10, %eax
    movabs $NX_PAGE, %rsi
    \insn
    ud2                         # it did not fault
    .section .tries, "aw"
    .quad .Ltry\@ - user_begin + USER_BASE
    .section .names, "aw"
    .quad .Lname\@
    .data
.Lname\@: .asciz "\name"
    .text
.endm

    .section .tries, "aw"
    .balign 8
tries:
    .section .names, "aw"
    .balign 8
names:
    try "nop", nop
    try "cli", cli
    try "hlt", hlt
    try "in", in $0x80, %al
    try "out", out %al, $0x80
    try "lidt", lidt (%rsp)
    try "read cr0", mov %cr0, %rax
    try "write cr3", mov %rax, %cr3
    try "rdmsr", rdmsr
    try "invlpg", invlpg (%rdi)
    try "read kernel", mov (%rdi), %eax
    try "write kernel", mov %eax, (%rdi)
    try "run kernel", jmp *%rdi
    try "write read-only", movabs %al, READ_ONLY_PAGE
    try "write code", mov %eax, 0(%rip)
    try "run no-execute", jmp *%rsi
    try "data selector", mov %eax, %ds
    try "nowhere", movabs 0x7ffffffff000, %al
    .section .tries
    .quad 0
    .text
