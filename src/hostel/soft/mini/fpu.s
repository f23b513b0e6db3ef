# x87, SSE and SSE2 in ring 3; #NM while CR0.TS is 1; FXSAVE and FXRSTOR.
.include "long.inc"
.include "pages.inc"
.include "user.inc"

.set DATA_PAGE, USER_BASE + 0x100000

main:
    movq $on_not_available, handlers + 7 * 8
    movq $on_end, handlers + 6 * 8
    mov %cr4, %rax
    or $0x600, %eax             # OSFXSR, OSXMMEXCPT
    mov %rax, %cr4
    mov %cr0, %rax
    or $8, %eax                 # TS
    mov %rax, %cr0
    call new_space
    mov %rax, %rdi
    call map_user_code
    call new_frame
    mov %rax, %r12
    lea PRESENT + WRITABLE + USER(%rax), %rdx
    movabs $DATA_PAGE, %rsi
    call map_page
    mov %rdi, %cr3
    user_address %rdi, program
    xor %esi, %esi
    call run_user
    mov not_available, %rax
    report "not available"
    mov (%r12), %rax
    report "x87 sum"
    mov 8(%r12), %rax
    report "x87 root"
    mov 16(%r12), %rax
    report "SSE2 sum"
    mov 32(%r12), %rax
    report "packed, low"
    mov 40(%r12), %rax
    report "packed, high"
    mov 48(%r12), %rax
    report "rounded"
    fxsave 0x200(%r12)
    movzwl 0x200(%r12), %eax
    report "control word"
    mov 0x218(%r12), %eax
    and $0xffc0, %eax           # without its flags: translators do not keep them
    report "MXCSR"
    mov 0x200 + 160 + 7 * 16(%r12), %rax
    report "xmm7"
    ret

# The first use after a switch: the kernel gives the unit (here it has no other state to load).
on_not_available:
    clts
    incq not_available
    ret

on_end:
    jmp end_user

.section .user, "ax"
program:
    movabs $DATA_PAGE, %rbx
    fninit
    fld1
    fldpi
    faddp
    fstpl (%rbx)
    fld1
    fadd %st(0), %st
    fsqrt
    fstpl 8(%rbx)
    mov $7, %eax
    cvtsi2sd %eax, %xmm0
    mov $3, %eax
    cvtsi2sd %eax, %xmm1
    divsd %xmm1, %xmm0
    addsd %xmm1, %xmm0
    movsd %xmm0, 16(%rbx)
    movabs $0x0102030405060708, %rax
    movq %rax, %xmm2
    movq %rax, %xmm3
    pshufd $0x4e, %xmm3, %xmm3
    por %xmm3, %xmm2
    paddb %xmm2, %xmm2
    movdqu %xmm2, 32(%rbx)
    cvttsd2si %xmm0, %rax
    mov %rax, 48(%rbx)
    movabs $0x7777777777777777, %rax
    movq %rax, %xmm7
    ud2

.bss
    .balign 8
not_available: .skip 8
