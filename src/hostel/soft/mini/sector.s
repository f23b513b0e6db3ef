# A boot sector: real mode, segments, the interrupt table at 0.
.set CONSOLE, 0xe9
.set DEBUG_EXIT, 0xf4
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
    mov $hello, %si
    call put_text
    movw $on_call, 0x21 * 4
    mov %ax, 0x21 * 4 + 2
    movw $on_divide, 0
    mov %ax, 2
    mov $7, %bx
    int $0x21                   # doubles it
    call put_bx
    xor %cx, %cx
    div %cx                     # the handler steps over it
    call put_bx
    mov $0x1234, %ax            # the same byte under two names: 1234:0010 and 1000:2350
    mov %ax, %es
    movb $0x5a, %es:0x10
    mov $0x1000, %ax
    mov %ax, %ds
    movzbw 0x2350, %bx
    xor %ax, %ax
    mov %ax, %ds
    call put_bx
    mov %ax, %es                # a string, from one segment to another
    mov $hello, %si
    mov $0x9000, %di
    mov $hello_end - hello, %cx
    rep movsb
    mov $0x900, %ax
    mov %ax, %ds
    xor %si, %si
    call put_text
    lcall $0x7c0, $far_away - _start
    xor %ax, %ax
    out %al, $DEBUG_EXIT
1:  hlt
    jmp 1b

on_call:
    shl $1, %bx
    iret

on_divide:
    push %bp
    mov %sp, %bp
    addw $2, 2(%bp)
    pop %bp
    mov $0xd0, %bx
    iret

far_away:
    mov %cs, %bx
    call put_bx
    lret

put_text:
    lodsb
    test %al, %al
    jz 1f
    out %al, $CONSOLE
    jmp put_text
1:  ret

# bx in four hexadecimal digits, a line.
put_bx:
    mov $4, %cx
1:  rol $4, %bx
    mov %bl, %al
    and $15, %al
    add $'0', %al
    cmp $'9', %al
    jbe 2f
    add $'a' - '0' - 10, %al
2:  out %al, $CONSOLE
    loop 1b
    mov $'\n', %al
    out %al, $CONSOLE
    ret

hello: .asciz "hello from real mode\n"
hello_end:
