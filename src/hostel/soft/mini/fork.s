# Copies of an address space as fork makes them: all frames shared and read-only; the first write copies.
.include "long.inc"
.include "pages.inc"

main:
    movq $on_page_fault, handlers + 14 * 8
    mov $PAGES, %esi
    call new_block
    mov %rax, originals
    call new_space
    mov %rax, %r12              # the parent
    mov %rax, %cr3
    mov %rax, space
    call fill_parent
    mov $COPIES, %r13d
1:  call copy_space
    mov %rax, %r14
    mov %rax, space
    mov %rax, %cr3
    call run_child
    mov %r12, %cr3              # the parent's pages are what they were
    mov %r12, space
    mov $USER_BASE, %rdi
    mov $PAGES * 4096, %rsi
    call checksum
    add %rax, parents
    call end_child
    dec %r13d
    jnz 1b
    call write_parent
    mov copies, %rax
    report "pages copied"
    mov children, %rax
    report "children read"
    mov parents, %rax
    report "parent read"
    mov originals, %rdi
    mov $PAGES * 4096, %esi
    call compare_data
    report "originals"
    ret

fill_parent:
    mov %r12, %rdi
    mov $USER_BASE, %rsi
    mov originals, %rdx
    or $PRESENT + WRITABLE, %rdx
    mov $PAGES, %ecx
1:  call map_page
    mov %rcx, (%rsi)
    mov %rsi, 4088(%rsi)
    add $4096, %rsi
    add $4096, %rdx
    dec %ecx
    jnz 1b
    ret

# rax = a space with the parent's pages; both may only read them now.
copy_space:
    call new_space
    mov %rax, %r8
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
1:  mov %r12, %rdi
    call entry_of
    andq $~WRITABLE, (%rax)
    invlpg (%rsi)
    mov (%rax), %rdx
    and $~(ACCESSED + DIRTY), %rdx
    mov %r8, %rdi
    call map_page
    add $4096, %rsi
    dec %ecx
    jnz 1b
    mov %r8, %rax
    ret

# It writes to every other page, and reads all.
run_child:
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
1:  test $1, %cl
    jz 2f
    mov %r13, 16(%rsi)
    add %rcx, 24(%rsi)
2:  add $4096, %rsi
    dec %ecx
    jnz 1b
    mov $USER_BASE, %rdi
    mov $PAGES * 4096, %rsi
    call checksum
    add %rax, children
    ret

# The child r14 is gone: its own frames are free, and it has no more tables.
end_child:
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
    mov originals, %rbx
1:  mov %r14, %rdi
    call entry_of
    mov (%rax), %rdi
    and $-4096, %rdi
    cmp %rbx, %rdi
    je 2f
    call free_frame
2:  add $4096, %rbx
    add $4096, %rsi
    dec %ecx
    jnz 1b
    mov %r14, %rdi              # PML4, PDPT, page directory, page table
    mov 8(%rdi), %rdx
    call free_frame
    mov %rdx, %rdi
    and $-4096, %rdi
    mov (%rdi), %rdx
    call free_frame
    mov %rdx, %rdi
    and $-4096, %rdi
    mov (%rdi), %rdx
    call free_frame
    mov %rdx, %rdi
    and $-4096, %rdi
    call free_frame
    ret

# Alone again, the parent takes its pages back one fault at a time.
write_parent:
    movq $1, alone
    mov $USER_BASE, %rsi
    mov $PAGES, %ecx
1:  addq $0x1000, (%rsi)
    add $4096, %rsi
    dec %ecx
    jnz 1b
    mov faults_alone, %rax
    report "pages taken back"
    ret

# A write to a shared page: a frame of its own, unless nobody shares it any more.
on_page_fault:
    cmpq $3, FRAME_ERROR(%rdi)  # present, write, ring 0
    jne unexpected
    mov %cr2, %rsi
    and $-4096, %rsi
    mov space, %rdi
    call entry_of
    cmpq $0, alone
    jne 1f
    incq copies
    mov %rax, %rdx
    call new_frame
    mov %rax, %rdi
    mov (%rdx), %rbx
    and $-4096, %rbx
    xchg %rsi, %rbx
    mov $512, %ecx
    rep movsq
    or $PRESENT + WRITABLE, %rax
    mov %rax, (%rdx)
    invlpg (%rbx)
    ret
1:  incq faults_alone
    orq $WRITABLE, (%rax)
    invlpg (%rsi)
    ret

.bss
    .balign 8
originals: .skip 8
space: .skip 8
copies: .skip 8
children: .skip 8
parents: .skip 8
alone: .skip 8
faults_alone: .skip 8
