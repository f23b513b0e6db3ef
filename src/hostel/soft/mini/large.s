# A page of 2 MiB beside small ones: the same memory by each, a split, and reserved bits.
.include "long.inc"
.include "pages.inc"

.set SMALL, USER_BASE
.set BIG, USER_BASE + 0x40000000
.set MEMORY, 0x600000           # 6 MiB: nothing else is there

main:
    call new_space
    mov %rax, %r12
    mov %rax, %cr3
    call map_both_ways
    movabs $SMALL + 0x1230, %rbx
    movabs $BIG + 0x1230, %rsi
    movq $0x1111, (%rbx)
    mov (%rsi), %rax
    report "small, then large"
    movq $0x2222, (%rsi)
    mov (%rbx), %rax
    report "large, then small"
    call large_bits
    call split
    call reserved
    mov $MEMORY, %edi
    mov $0x4000, %esi
    call compare_data
    report "left"
    ret

map_both_ways:
    mov %r12, %rdi
    movabs $SMALL, %rsi
    mov $MEMORY + PRESENT + WRITABLE, %edx
    mov $4, %ecx
1:  call map_page
    add $4096, %rsi
    add $4096, %rdx
    dec %ecx
    jnz 1b
    call new_frame              # a page directory, for the second GiB
    movq $MEMORY + PRESENT + WRITABLE + LARGE, (%rax)
    mov %rax, directory
    mov 8(%r12), %rdx
    and $-4096, %rdx
    lea PRESENT + WRITABLE(%rax), %rcx
    mov %rcx, 8(%rdx)
    ret

large_bits:
    mov directory, %rdx
    mov (%rdx), %rax
    and $ACCESSED + DIRTY + LARGE, %eax
    report "bits of the large page"
    ret

# The large page becomes 512 small ones, one of them another frame.
split:
    call new_frame
    mov %rax, %rdi
    mov $MEMORY + PRESENT + WRITABLE, %edx
    xor %ecx, %ecx
1:  mov %rdx, (%rdi, %rcx, 8)
    add $4096, %rdx
    inc %ecx
    cmp $512, %ecx
    jne 1b
    mov $MEMORY + 0x3000 + PRESENT + WRITABLE, %edx
    mov %rdx, 8(%rdi)           # page 1 is now frame 3
    or $PRESENT + WRITABLE, %rdi
    mov directory, %rdx
    mov %rdi, (%rdx)
    movabs $BIG, %rbx
    invlpg (%rbx)
    mov %cr3, %rax
    mov %rax, %cr3
    movq $0x4444, 0x1230(%rbx)
    mov MEMORY + 0x3230, %rax
    report "split"
    mov MEMORY + 0x1230, %rax
    report "the frame before"
    ret

# Bits 13 to 20 of a large page's address must be 0 (SDM vol. 3A table 4-18): RSVD in the error code.
reserved:
    mov directory, %rdx
    movq $MEMORY + 0x2000 + PRESENT + WRITABLE + LARGE, (%rdx)
    movabs $BIG, %rbx
    invlpg (%rbx)
    mov %cr3, %rax
    mov %rax, %cr3
    attempt mov (%rbx), %al
    report_fault "reserved, read"
    attempt mov %al, (%rbx)
    report_fault "reserved, write"
    movq $0, (%rdx)
    invlpg (%rbx)
    attempt mov (%rbx), %al
    report_fault "nothing"
    ret

.bss
    .balign 8
directory: .skip 8
