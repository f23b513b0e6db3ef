# Checks that emulators leave out: a segment's limit and type at each access (SDM vol. 3A §5.3, §5.4), the
# reserved bits of PAE's directory pointers.
.include "flat.inc"

main:
    mov $SMALL, %eax
    mov %eax, %fs
    attempt movl $0x1234, %fs:12
    report_fault "in the segment"
    attempt movl $0x5678, %fs:13
    report_fault "over its end"
    mov small + 12, %eax
    report "what is there"
    xor %eax, %eax
    mov %eax, %fs
    attempt mov %fs:0, %eax
    report_fault "through a null selector"
    attempt movl $1, %cs:small
    report_fault "write to code"
    call reserved
    ret

# A bit that must be 0 in a PAE directory pointer: the load of CR3 itself faults (SDM vol. 3A §4.4.1).
reserved:
    movl $0x83, directory       # the first 2 MiB
    movl $directory + PRESENT, pointers
    mov %cr4, %eax
    or $0x20, %eax              # PAE
    mov %eax, %cr4
    mov $pointers, %eax
    mov %eax, %cr3
    mov %cr0, %ecx
    or $0x80000000, %ecx        # PG
    mov %ecx, %cr0
    movl $directory + PRESENT + WRITABLE, pointers + 8
    attempt mov %eax, %cr3
    report_fault "reserved bit of a pointer"
    ret

.bss
    .balign 4096
directory: .skip 4096
pointers: .skip 32
