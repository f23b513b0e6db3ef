# A boot sector that goes through the modes: real, 32-bit protected, real again, 64-bit, and out.
.set CONSOLE, 0xe9
.set DEBUG_EXIT, 0xf4
.set CODE32, 0x08
.set DATA, 0x10
.set CODE16, 0x18
.set CODE64, 0x20
.set TABLES, 0x1000
.code16
.globl _start
_start:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov $real_text, %si
    call put_text
    lgdt gdt_pointer
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    ljmp $CODE32, $protected

.code32
protected:
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %ss
    mov $protected_text, %esi
1:  lodsb
    test %al, %al
    jz 2f
    out %al, $CONSOLE
    jmp 1b
2:  ljmp $CODE16, $leave_protected

.code16
leave_protected:
    mov $DATA, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov %cr0, %eax
    and $0xfe, %al
    mov %eax, %cr0
    ljmp $0, $real_again
real_again:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $again_text, %si
    call put_text
    mov $TABLES, %edi           # PML4, PDPT, page directory: the first 2 MiB
    mov $3 * 1024, %ecx
    xor %eax, %eax
    rep stosl
    movl $TABLES + 0x1003, TABLES
    movl $TABLES + 0x2003, TABLES + 0x1000
    movl $0x83, TABLES + 0x2000
    mov $0x20, %eax             # PAE
    mov %eax, %cr4
    mov $TABLES, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx       # EFER.LME
    rdmsr
    or $1, %ah
    wrmsr
    mov %cr0, %eax              # PE and PG at once: from real mode straight to long mode
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmp $CODE64, $long

.code64
long:
    mov $DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov $long_text, %esi
1:  lodsb
    test %al, %al
    jz 2f
    out %al, $CONSOLE
    jmp 1b
2:  mov $-1, %rax
    shr $60, %rax
    add $'a' - 10, %al          # f, if registers have 64 bits
    out %al, $CONSOLE
    mov $'\n', %al
    out %al, $CONSOLE
    xor %eax, %eax
    out %al, $DEBUG_EXIT
3:  hlt
    jmp 3b

.code16
put_text:
    lodsb
    test %al, %al
    jz 1f
    out %al, $CONSOLE
    jmp put_text
1:  ret

real_text: .asciz "real\n"
protected_text: .asciz "protected\n"
again_text: .asciz "real again\n"
long_text: .asciz "long "
    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # CODE32
    .quad 0x00cf93000000ffff    # DATA
    .quad 0x00009b000000ffff    # CODE16
    .quad 0x00af9b000000ffff    # CODE64
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt
