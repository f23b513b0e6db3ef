# Accessed and dirty bits, at every level, as the processor leaves them (SDM vol. 3A §4.8).
.include "long.inc"
.include "pages.inc"

main:
    call new_space
    mov %rax, %r12
    mov %rax, %rdi
    mov $USER_BASE, %rsi
    call new_frame
    movb $0xc3, 64(%rax)        # RET
    lea PRESENT + WRITABLE(%rax), %rdx
    call map_page
    mov %r12, %cr3
    mov $USER_BASE, %rbx
    call bits
    report "untouched"
    mov (%rbx), %al
    call bits
    report "read"
    mov %al, (%rbx)
    call bits
    report "written"
    call clear
    mov %al, 8(%rbx)
    call bits
    report "written again"
    call clear
    lea 64(%rbx), %rax
    call *%rax
    call bits
    report "run"
    call clear
    attempt mov %al, 4096(%rbx)
    report_fault "beside it"    # the tables on the way may be marked or not
    call clear
    lock xaddl %eax, 16(%rbx)
    call bits
    report "exchanged"
    movabs $USER_BASE, %rsi     # read-only: a write that faults leaves no dirty bit
    mov %r12, %rdi
    call entry_of
    andq $~WRITABLE, (%rax)
    call clear
    attempt movb $1, (%rbx)
    report_fault "read-only"
    call bits
    and $DIRTY, %eax            # the others may be set or not
    report "not dirty"
    ret

# rax = A and D, one byte a level: PML4, PDPT, page directory, page table from high to low.
# In a table's entry bit 6 means nothing; it is left out.
bits:
    push %rbx
    push %rcx
    push %rdx
    xor %eax, %eax
    lea 8(%r12), %rdx           # USER_BASE is entry 1 of the PML4, 0 of the others
    mov $4, %ecx
1:  mov (%rdx), %rbx
    shl $8, %rax
    mov %bl, %al
    movabs $ADDRESS_MASK, %rdx
    and %rbx, %rdx
    dec %ecx
    jnz 1b
    and $0x20202060, %eax
    pop %rdx
    pop %rcx
    pop %rbx
    ret

# A and D off at every level, and the TLB told.
clear:
    push %rbx
    push %rcx
    push %rdx
    lea 8(%r12), %rdx
    movabs $ADDRESS_MASK, %rcx
    mov $4, %ebx
1:  andq $~(ACCESSED + DIRTY), (%rdx)
    mov (%rdx), %rdx
    and %rcx, %rdx
    dec %ebx
    jnz 1b
    mov %cr3, %rdx
    mov %rdx, %cr3
    pop %rdx
    pop %rcx
    pop %rbx
    ret
