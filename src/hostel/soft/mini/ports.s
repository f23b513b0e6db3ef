# IN and OUT of each width, by immediate and by DX, and strings of them.
.include "long.inc"

.set NOBODY, 0x7f0              # no device of any machine of ours

main:
    mov $0x1234567800000000, %rax
    in $CONSOLE, %al            # al only
    report "byte"
    mov $NOBODY, %edx
    mov $0x1234567800000000, %rax
    in %dx, %al
    report "nobody, byte"
    mov $0x1234567800000000, %rax
    in %dx, %ax                 # ax only
    report "nobody, word"
    mov $0x1234567800000000, %rax
    in %dx, %eax                # the upper half becomes 0
    report "nobody, dword"
    mov %eax, %eax
    out %eax, %dx
    mov $CONSOLE, %edx
    mov $text, %esi
    mov $text_end - text, %ecx
    rep outsb
    mov %rcx, %rax
    report "left"
    mov %rsi, %rax
    sub $text, %rax
    report "read"
    mov $buffer, %edi
    mov $8, %ecx
    rep insb
    mov buffer, %rax
    report "insb"
    mov $text_end - 1, %esi     # downwards
    mov $text_end - text, %ecx
    std
    rep outsb
    cld
    lea 1(%rsi), %rax
    sub $text, %rax
    report "backwards"
    ret

.data
text: .ascii "\na string by rep outsb\n"
text_end:
.bss
    .balign 8
buffer: .skip 8
