# 32-bit protected mode without paging: segments, and what ring 3 may do.
.include "flat.inc"

main:
    say "hello from 32-bit mode"
    newline
    xor %edx, %edx
    xor %ecx, %ecx
    attempt divl %ecx
    report_fault "divide"
    attempt ud2
    report_fault "undefined"
    mov $ABSENT, %eax
    attempt mov %eax, %fs
    report_fault "not present"
    mov $0x1000, %eax
    attempt mov %eax, %fs
    report_fault "no such segment"
    call ring3
    ret

# Ring 3 writes to a port that its TSS allows, and to one that it does not.
ring3:
    movl $on_user_fault, handlers + 13 * 4
    movl $on_user_fault, handlers + 6 * 4
    andb $~(1 << (CONSOLE & 7)), io_map + CONSOLE / 8
    mov $talk, %edi
    mov $user_stack + 256, %esi
    call run_user
    report_fault "after talking"
    mov $try_exit, %edi
    call run_user
    report_fault "the other port"
    mov $try_cli, %edi
    call run_user
    report_fault "cli"
    mov $try_data, %edi
    call run_user
    report_fault "the kernel's data"
    ret

on_user_fault:
    cmpl $USER_CODE, FRAME_CS(%edi)
    jne on_fault
    call note_fault
    jmp end_user

talk:
    mov $talk_text, %esi
1:  lodsb
    test %al, %al
    jz 2f
    out %al, $CONSOLE
    jmp 1b
2:  mov %cs, %eax
    and $3, %eax
    add $'0', %al
    out %al, $CONSOLE
    mov $'\n', %al
    out %al, $CONSOLE
    ud2

try_exit:
    mov $0x3d, %al
    out %al, $DEBUG_EXIT
    ud2

try_cli:
    cli
    ud2

try_data:
    mov $DATA, %eax
    mov %eax, %ds
    ud2

.data
talk_text: .asciz "hello from ring "
.bss
    .balign 16
user_stack: .skip 256
