# Code that changes: at its own address, through another, ahead in the same block, and in a frame used anew.
.include "long.inc"
.include "pages.inc"

.set ALIAS, USER_BASE + 0x1000
.set FRESH, USER_BASE + 0x200000

main:
    call new_space
    mov %rax, %r12
    mov %rax, %rdi
    movabs $ALIAS, %rsi
    mov $patched, %edx
    and $-4096, %edx
    or $PRESENT + WRITABLE, %edx
    call map_page
    mov %r12, %cr3
    call own_address
    call other_address
    call ahead
    call frame_anew
    ret

# The constant of an instruction is the round's number.
own_address:
    mov $ROUNDS, %ecx
    xor %ebx, %ebx
1:  mov %ecx, patched + 1
    call patched
    add %rax, %rbx
    dec %ecx
    jnz 1b
    mov %rbx, %rax
    report "own address"
    ret

# The same, written through a second mapping. A branch is enough for the processor that wrote, but only
# through the same address; else a serializing instruction is asked for (SDM vol. 3A §8.1.3, §11.6).
other_address:
    mov $ROUNDS, %r13d
    xor %r14d, %r14d
    mov $patched + 1, %esi
    and $4095, %esi
    movabs $ALIAS, %rdi
    add %rdi, %rsi
1:  mov %r13d, (%rsi)
    xor %eax, %eax
    cpuid
    call patched
    add %rax, %r14
    dec %r13d
    jnz 1b
    mov %r14, %rax
    report "other address"
    ret

# The next instruction but one: a loop that grows the constant it is about to load.
ahead:
    mov $ROUNDS, %ecx
    xor %ebx, %ebx
    movl $0, 2f + 1
1:  incl 2f + 1
    jmp 2f
2:  mov $0, %eax
    add %rax, %rbx
    dec %ecx
    jnz 1b
    mov %rbx, %rax
    report "ahead"
    ret

# Code copied to a page, run, unmapped; other code in the same frame at the same address.
frame_anew:
    call new_frame
    mov %rax, %r13
    mov $first, %esi
    call run_copy
    report "first"
    mov $second, %esi
    call run_copy
    report "second"
    ret

# rax = what the 16 bytes of code at rsi give, run at FRESH in frame r13.
run_copy:
    mov %r13, %rdi
    mov $2, %ecx
    rep movsq
    mov %r12, %rdi
    movabs $FRESH, %rsi
    lea PRESENT(%r13), %rdx
    call map_page
    xor %eax, %eax
    cpuid
    movabs $FRESH, %rax
    call *%rax
    mov %rax, %rbx
    call unmap_page
    mov %rbx, %rax
    ret

    .balign 16
first:
    mov $0x1111, %eax
    ret
    .balign 16
second:
    mov $0x2222, %eax
    shl $4, %eax
    ret

    .balign 4096
patched:
    mov $0, %eax
    ret
