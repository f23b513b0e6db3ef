# A driver of the copy engine (soft/dma.py): one copy between addresses that it was told, good or evil.
# Where there is no such device it says so.
.include "long.inc"

.set DEVICE, 0x30000000         # 768 MiB: beyond the memory, in the identity map
.set IDENTITY, 0x414d4448       # "HDMA"

main:
    mov $DEVICE, %ebx
    cmpl $IDENTITY, (%rbx)
    jne absent
    movabs $SOURCE, %rax
    mov %rax, 0x08(%rbx)
    movabs $DESTINATION, %rax
    mov %rax, 0x10(%rbx)
    movq $LENGTH, 0x18(%rbx)
    movq $1, 0x20(%rbx)         # copy
1:  pause
    mov 0x28(%rbx), %rax        # status: 0 until it is done
    test %rax, %rax
    jz 1b
    report "status"
    ret

absent:
    say "no device"
    newline
    ret
