# Instructions whose operand is no memory: each width, sign and zero extension, read-modify-write, strings.
# Nobody answers at that address: a read gives ones, and what is written is seen by the host only.
.include "long.inc"

.set DEVICE, 0x60000000         # 1.5 GiB: beyond the memory, below the PCI window
.set WINDOW, 0x40000000         # 1 GiB: where it is mapped
.set BUFFER, 0x400000

main:
    movl $DEVICE + PRESENT + WRITABLE + LARGE + 0x18, directory     # uncached
    movl $directory + PRESENT + WRITABLE, boot_pdpt + 8
    mov $WINDOW, %ebx
    mov $0x1122334455667788, %rax
    mov %al, (%rbx)
    mov %ax, 2(%rbx)
    mov %eax, 4(%rbx)
    mov %rax, 8(%rbx)
    movb $0x5a, 16(%rbx)
    movw $0x5a5a, 18(%rbx)
    movl $0x12345678, 20(%rbx)
    movq $-2, 24(%rbx)
    mov $0, %eax
    mov (%rbx), %al
    report "byte"
    mov 4(%rbx), %ax
    report "word"
    mov $-1, %rax
    mov 4(%rbx), %eax
    report "dword"
    mov 8(%rbx), %rax
    report "qword"
    movzbl 1(%rbx), %eax
    report "zero-extended"
    movsbq 1(%rbx), %rax
    report "sign-extended"
    movzwl 2(%rbx), %eax
    report "zero-extended word"
    xor %eax, %eax
    add 4(%rbx), %eax
    report "added"
    mov $5, %eax
    add %eax, 32(%rbx)          # writes 4: the sum of ones and 5
    andl $0xf0f0, 36(%rbx)
    xchg %eax, 40(%rbx)
    report "exchanged"
    cmpl $-1, 4(%rbx)
    sete %al
    movzbl %al, %eax
    report "compared"
    testb $0x80, (%rbx)
    setnz %al
    movzbl %al, %eax
    report "tested"
    call strings
    ret

strings:
    lea 64(%rbx), %rdi
    mov $0xabcd0123, %eax
    mov $3, %ecx
    rep stosl
    mov %rdi, %rax
    sub %rbx, %rax
    report "stored"
    mov $text, %esi             # memory to device
    lea 128(%rbx), %rdi
    mov $2, %ecx
    rep movsq
    lea 256(%rbx), %rsi         # device to memory
    mov $BUFFER, %edi
    mov $3, %ecx
    rep movsw
    mov BUFFER, %rax
    report "moved"
    mov %rsi, %rax
    sub %rbx, %rax
    report "read up to"
    ret

.data
text: .ascii "sixteen bytes it"
.bss
    .balign 4096
directory: .skip 4096
