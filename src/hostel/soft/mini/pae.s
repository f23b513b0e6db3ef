# PAE paging: entries of 8 bytes, four directory pointers that CR3 loads, pages of 2 MiB, no-execute.
.include "flat.inc"

.set WINDOW, 0x40000000         # of pointer 1: pages of 4 KiB
.set BIG, 0x80000000            # of pointer 2: one page of 2 MiB
.set MEMORY, 0x800000

main:
    call make_tables
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $pointers, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx       # EFER.NXE
    rdmsr
    or $0x800, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80010000, %eax        # PG, WP
    mov %eax, %cr0
    say "paging"
    newline
    movl $0x1111, WINDOW
    mov BIG, %eax
    report "small, then large"
    movl $0x2222, BIG + 8
    mov WINDOW + 8, %eax
    report "large, then small"
    mov table, %eax
    and $ACCESSED + DIRTY, %eax
    report "small bits"
    mov big_directory, %eax
    and $ACCESSED + DIRTY + LARGE, %eax
    report "large bits"
    attempt mov WINDOW + 0x1000, %eax
    report_fault "not present"
    attempt mov 0xc0000000, %eax
    report_fault "no pointer"
    call no_execute
    call pointers_are_loaded
    call reserved
    mov $MEMORY, %edi
    mov $0x1000, %esi
    call compare_data
    report "left"
    ret

make_tables:
    movl $low_directory + PRESENT, pointers
    movl $window_directory + PRESENT, pointers + 8
    movl $big_directory + PRESENT, pointers + 16
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $21, %eax
    or $PRESENT + WRITABLE + LARGE, %eax
    mov %eax, low_directory(, %ecx, 8)
    inc %ecx
    cmp $8, %ecx
    jne 1b
    movl $table + PRESENT + WRITABLE, window_directory
    movl $MEMORY + PRESENT + WRITABLE, table
    movl $MEMORY + PRESENT + WRITABLE + LARGE, big_directory
    ret

no_execute:
    movb $0xc3, WINDOW + 64     # RET
    mov $WINDOW + 64, %ebx
    call *%ebx
    movl $0x80000000, table + 4
    invlpg (%ebx)
    mov %esp, %ebp
    attempt call *%ebx
    mov %ebp, %esp
    report_fault "no-execute"
    movl $0, table + 4
    invlpg (%ebx)
    ret

# The processor keeps the four pointers: a change is not seen until CR3 is loaded (SDM vol. 3A §4.4.1).
pointers_are_loaded:
    movl $big_directory + PRESENT, pointers + 24
    mov $pointers, %eax
    mov %eax, %cr3
    mov 0xc0000000, %eax
    report "pointer 3"
    movl $0, pointers + 24
    mov $pointers, %eax
    mov %eax, %cr3
    attempt mov 0xc0000000, %eax
    report_fault "pointer 3, gone"
    ret

reserved:
    movl $MEMORY + 0x2000 + PRESENT + WRITABLE + LARGE, big_directory
    mov $pointers, %eax
    mov %eax, %cr3
    attempt mov BIG, %eax
    report_fault "reserved bit of a large page"
    ret

.bss
    .balign 4096
low_directory: .skip 4096
window_directory: .skip 4096
big_directory: .skip 4096
table: .skip 4096
pointers: .skip 32
