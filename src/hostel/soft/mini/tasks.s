# Hardware task switches: by CALL, JMP, IRET and the IDT's task gates; without paging and with it.
.include "flat.inc"

.set TASK_A, 0x40
.set TASK_B, 0x48
.set GATE_A, 0x50               # a task gate to A
.set GONE, 0x58                 # a TSS that is not present
.set SHORT, 0x60                # one that is too short
.set TASK_D, 0x68               # one whose DS is nowhere
.set WINDOW, 0x800000           # 8 MiB: what the directories map in two ways
.set BUSY, 0x200
.set NT, 0x4000
.set TS, 8

main:
    mov $tss_a, %eax
    mov $TASK_A, %ebx
    mov $task_a, %edx
    call describe
    mov $tss_b, %eax
    mov $TASK_B, %ebx
    mov $task_b, %edx
    call describe
    mov $tss_d, %eax
    mov $TASK_D, %ebx
    xor %edx, %edx
    call describe
    movl $0x400, tss_d + 0x54
    mov $tss, %eax
    mov %ax, wide + TSS + 2
    shr $16, %eax
    mov %al, wide + TSS + 4
    mov %ah, wide + TSS + 7
    lgdt wide_pointer
    call calls
    call jumps
    call gates
    call refused
    call pages
    ret

# A TSS at eax, its descriptor ebx, its entry edx.
describe:
    mov %ax, wide + 2(%ebx)
    mov %eax, %ecx
    shr $16, %ecx
    mov %cl, wide + 4(%ebx)
    mov %ch, wide + 7(%ebx)
    mov %edx, 0x20(%eax)
    movl $2, 0x24(%eax)
    lea 2048(%eax), %ecx
    mov %ecx, 0x38(%eax)
    movl $0xb0b, 0x34(%eax)     # EBX
    movl $CODE, 0x4c(%eax)
    mov $DATA, %ecx
    mov %ecx, 0x48(%eax)
    mov %ecx, 0x50(%eax)
    mov %ecx, 0x54(%eax)
    movw $104, 0x66(%eax)
    ret

# There and back by CALL and IRET: nested, the link is the caller's, registers are each task's own.
calls:
    say "call"
    newline
    mov $0x1234, %ebx
    mov $0x5678, %ebp
    lcall $TASK_A, $0
    mov %ebx, %eax
    report "ebx"
    mov %ebp, %eax
    report "ebp"
    str %ax
    movzwl %ax, %eax
    report "task"
    pushf
    pop %eax
    and $NT, %eax
    report "nested"
    say "call by gate"
    newline
    lcall $GATE_A, $0
    mov wide + TASK_A + 4, %eax
    and $BUSY, %eax
    report "busy"
    ret

task_a:
    str %ax
    movzwl %ax, %eax
    report "in task"
    movzwl tss_a, %eax
    report "link"
    pushf
    pop %eax
    and $NT, %eax
    report "nested"
    mov %cr0, %eax
    and $TS, %eax
    report "TS"
    clts
    mov %ebx, %eax
    report "ebx"
    inc %ebx
    mov wide + TSS + 4, %eax
    and $BUSY, %eax
    report "caller busy"
    iret
    jmp task_a                  # it goes on behind its IRET

# There and back by JMP: no link, the one who leaves is free again.
jumps:
    say "jump"
    newline
    ljmp $TASK_B, $0
    clts
    mov wide + TASK_B + 4, %eax
    and $BUSY, %eax
    report "busy"
    ret

task_b:
    pushf
    pop %eax
    and $NT, %eax
    report "nested"
    mov wide + TSS + 4, %eax
    and $BUSY, %eax
    report "left busy"
    ljmp $TSS, $0
    jmp task_b

# Interrupts and exceptions through task gates: the handler sees its error code on its own stack.
gates:
    movl $TASK_A << 16, idt + 0x40 * 8
    movl $0x8500, idt + 0x40 * 8 + 4
    say "interrupt"
    newline
    int $0x40
    say "exception"
    newline
    mov $task_c, %eax
    mov %eax, tss_b + 0x20
    pushl idt + 13 * 8
    pushl idt + 13 * 8 + 4
    movl $TASK_B << 16, idt + 13 * 8
    movl $0x8500, idt + 13 * 8 + 4
    mov $0x77, %eax
    mov %eax, %fs
behind:
    clts
    popl idt + 13 * 8 + 4
    popl idt + 13 * 8
    ret

task_c:
    pop %eax
    report "error"
    movzwl tss_b, %eax
    report "link"
    mov tss + 0x20, %eax
    sub $behind, %eax
    report "eip less behind"
    movl $behind, tss + 0x20
    iret
    jmp task_c

# What the processor finds wrong, in this task or in the next.
refused:
    attempt lcall $GONE, $0
    report_fault "not present"
    attempt lcall $SHORT, $0
    report_fault "too short"
    attempt lcall $TSS, $0
    report_fault "busy"
    attempt ljmp $0x400, $0
    report_fault "beyond the table"
    movl $2 * 8 * 8 << 16, idt + 0x41 * 8
    movl $0x8500, idt + 0x41 * 8 + 4
    attempt int $0x41
    report_fault "gate to nowhere"
    attempt lcall $TASK_D, $0
    str %ax
    cmp $TASK_D, %ax
    jne 1f
    report_fault "in the new task"
    clts
    iret
1:  say "and back"
    newline
    ret

# A task of its own address space.
pages:
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $22, %eax
    or $PRESENT + WRITABLE + LARGE, %eax
    mov %eax, first(, %ecx, 4)
    mov %eax, second(, %ecx, 4)
    inc %ecx
    cmp $4, %ecx
    jne 1b
    movl $WINDOW + 0x400000 + PRESENT + WRITABLE + LARGE, second + (WINDOW >> 22) * 4
    movl $0x111, WINDOW
    movl $0x222, WINDOW + 0x400000
    mov %cr4, %eax
    or $0x10, %eax              # PSE
    mov %eax, %cr4
    mov $first, %eax
    mov %eax, %cr3
    movl $first, tss + 0x1c
    movl $second, tss_a + 0x1c
    movl $looks, tss_a + 0x20
    mov %cr0, %eax
    or $0x80000000, %eax        # PG
    mov %eax, %cr0
    say "paging"
    newline
    mov WINDOW, %eax
    report "mine"
    lcall $TASK_A, $0
    mov WINDOW, %eax
    report "mine"
    mov %cr3, %eax
    sub $first, %eax
    report "cr3 less first"
    ret

looks:
    mov WINDOW, %eax
    report "its own"
    iret

.data
    .balign 8
wide:
    .quad 0
    .quad 0x00cf9b000000ffff    # as in flat.inc
    .quad 0x00cf93000000ffff
    .quad 0x00cffb000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00008b0000000088    # loaded: busy
    .quad 0x004093000000000f
    .quad 0x0040130000000fff
    .quad 0x0000890000000067    # TASK_A
    .quad 0x0000890000000067    # TASK_B
    .quad 0x0000850000400000    # GATE_A
    .quad 0x0000090000000067    # GONE
    .quad 0x0000890000000066    # SHORT
    .quad 0x0000890000000067    # TASK_D
wide_pointer:
    .word wide_pointer - wide - 1
    .long wide

.bss
    .balign 4096
first: .skip 4096
second: .skip 4096
tss_a: .skip 2048
tss_b: .skip 2048
tss_d: .skip 2048
    .skip 2048
