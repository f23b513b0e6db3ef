# A storm of page faults: ring 3 touches pages that are not there; then ones that it may only read.
.include "long.inc"
.include "pages.inc"
.include "user.inc"

.set DATA_BASE, USER_BASE + 0x40000000

main:
    movq $on_page_fault, handlers + 14 * 8
    movq $on_end, handlers + 6 * 8
    call new_space
    mov %rax, %r12
    mov %rax, %rdi
    call map_user_code
    mov $PAGES, %esi
    call new_block
    mov %rax, frames
    mov %r12, %cr3
    mov $1, %edx
    call storm
    call protect_all
    mov $0x100, %edx
    call storm
    mov missing, %rax
    report "not present"
    mov protected, %rax
    report "protected"
    mov codes, %rax
    report "error codes"
    mov $DATA_BASE, %rdi
    mov $PAGES * 4096, %rsi
    call checksum
    report "through the tables"
    mov frames, %rdi
    mov $PAGES * 4096, %esi
    call compare_data
    report "in memory"
    ret

storm:
    user_address %rdi, program
    xor %esi, %esi              # no stack: it needs none
    jmp run_user

# rdi = frame. A page that is not there gets the next frame, one that is read-only becomes writable.
on_page_fault:
    mov FRAME_ERROR(%rdi), %rax
    add %rax, codes
    mov %rax, %rdx
    mov %cr2, %rsi
    and $-4096, %rsi
    mov %r12, %rdi
    call entry_of
    test $1, %dl
    jnz 1f
    incq missing
    mov %rsi, %rcx
    movabs $DATA_BASE, %rdx
    sub %rdx, %rcx
    cmp $PAGES * 4096, %rcx
    jae outside
    add frames, %rcx
    or $PRESENT + WRITABLE + USER, %rcx
    mov %rcx, (%rax)
    ret
1:  incq protected
    orq $WRITABLE, (%rax)
    invlpg (%rsi)
    ret

outside:
    say "a fault outside the data"
    newline
    finish 1

protect_all:
    mov %r12, %rdi
    mov $DATA_BASE, %rsi
    mov $PAGES, %ecx
1:  call entry_of
    andq $~WRITABLE, (%rax)
    invlpg (%rsi)
    add $4096, %rsi
    dec %ecx
    jnz 1b
    ret

on_end:
    jmp end_user

.section .user, "ax"
# rdi: what is written; two words of each page.
program:
    movabs $DATA_BASE, %rsi
    mov $PAGES, %ecx
1:  mov 2048(%rsi), %rax        # a read comes first
    add %rdi, %rax
    add %rcx, %rax
    mov %rax, 2048(%rsi)
    add %rax, 8(%rsi)
    add $4096, %rsi
    dec %ecx
    jnz 1b
    ud2

.bss
    .balign 8
frames: .skip 8
missing: .skip 8
protected: .skip 8
codes: .skip 8
