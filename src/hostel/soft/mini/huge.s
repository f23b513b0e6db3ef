# A page of 1 GiB beside small ones. A processor says whether it has such (CPUID 80000001, EDX bit 26).
.include "long.inc"
.include "pages.inc"

.set SMALL, USER_BASE
.set HUGE, USER_BASE + 0x40000000
.set MEMORY, 0x600000           # 6 MiB: nothing else is there

main:
    call new_space
    mov %rax, %r12
    mov %rax, %rdi
    mov %rax, %cr3
    movabs $SMALL, %rsi
    mov $MEMORY + PRESENT + WRITABLE, %edx
    call map_page
    mov 8(%r12), %r13           # the page-directory pointers under USER_BASE
    and $-4096, %r13
    movq $PRESENT + WRITABLE + LARGE, 8(%r13)
    movabs $SMALL, %rbx
    movabs $HUGE + MEMORY, %rsi
    movq $0x1111, (%rbx)
    mov (%rsi), %rax
    report "small, then huge"
    call bits
    report "bits, read"
    movq $0x2222, 8(%rsi)
    mov 8(%rbx), %rax
    report "huge, then small"
    call bits
    report "bits, written"
    movabs $HUGE + 0x40000000, %rbx
    attempt mov (%rbx), %al
    report_fault "beyond it"
    movq $0x2000 + PRESENT + WRITABLE + LARGE, 8(%r13)  # bits 13 to 29 must be 0
    movabs $HUGE, %rbx
    invlpg (%rbx)
    mov %cr3, %rax
    mov %rax, %cr3
    attempt mov (%rbx), %al
    report_fault "reserved"
    mov $MEMORY, %edi
    mov $0x1000, %esi
    call compare_data
    report "left"
    ret

bits:
    mov 8(%r13), %rax
    and $ACCESSED + DIRTY + LARGE, %eax
    ret
