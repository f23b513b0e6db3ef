# After INVLPG, a CR3 load or a change of CR4.PGE the new translation must be used (SDM vol. 3A §4.10.4.1).
# What must be seen without them is not asked: an old translation may be used, or not.
.include "long.inc"
.include "pages.inc"

.set PAGE, USER_BASE

main:
    call new_space
    mov %rax, %r12
    call new_frame
    movq $0xaaaa, (%rax)
    mov %rax, %r13
    call new_frame
    movq $0xbbbb, (%rax)
    mov %rax, %r14
    movabs $PAGE, %rbx
    mov %r12, %cr3
    lea PRESENT + WRITABLE(%r13), %rdx
    call set_entry              # from nothing: no entry was kept, none need be invalidated
    mov (%rbx), %rax
    report "first"
    lea PRESENT + WRITABLE(%r14), %rdx
    call set_entry
    invlpg (%rbx)
    mov (%rbx), %rax
    report "other frame, INVLPG"
    lea PRESENT + WRITABLE(%r13), %rdx
    call set_entry
    mov %r12, %cr3
    mov (%rbx), %rax
    report "other frame, CR3"
    lea PRESENT(%r13), %rdx
    call set_entry
    invlpg 0x123(%rbx)          # any address in the page
    attempt movb $1, (%rbx)
    report_fault "write, now read-only"
    lea PRESENT + WRITABLE(%r13), %rdx
    call set_entry              # more rights: at worst a fault that the processor itself dispels
    attempt movb $1, (%rbx)
    report_fault "write, writable again"
    xor %edx, %edx
    call set_entry
    invlpg (%rbx)
    attempt mov (%rbx), %al
    report_fault "gone"
    call globals
    call through_tables
    ret

# A global page outlives a CR3 load, so INVLPG or PGE must be used.
globals:
    mov %cr4, %rax
    or $0x80, %eax
    mov %rax, %cr4
    lea PRESENT + WRITABLE + GLOBAL(%r13), %rdx
    call set_entry
    mov (%rbx), %rax
    report "global"
    lea PRESENT + WRITABLE + GLOBAL(%r14), %rdx
    call set_entry
    invlpg (%rbx)
    mov (%rbx), %rax
    report "global, INVLPG"
    lea PRESENT + WRITABLE + GLOBAL(%r13), %rdx
    call set_entry
    mov %cr4, %rax
    and $~0x80, %eax
    mov %rax, %cr4
    mov (%rbx), %rax
    report "global, PGE off"
    ret

# A table higher up is exchanged: INVLPG drops what was kept of it too (SDM vol. 3A §4.10.4.1).
through_tables:
    call new_space
    mov %rax, %rdi
    mov %rbx, %rsi
    lea PRESENT + WRITABLE(%r14), %rdx
    call map_page
    mov 8(%rdi), %rdx           # the other space's tables under USER_BASE
    mov %rdx, 8(%r12)
    invlpg (%rbx)
    mov (%rbx), %rax
    report "other tables, INVLPG"
    ret

set_entry:
    mov %r12, %rdi
    mov %rbx, %rsi
    jmp map_page
