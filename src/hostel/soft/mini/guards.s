# What keeps the kernel from its own mistakes: NX, CR0.WP, SMEP, SMAP (SDM vol. 3A §4.6).
.include "long.inc"
.include "pages.inc"

.set NX_PAGE, USER_BASE
.set READ_ONLY, USER_BASE + 0x1000
.set USERS, USER_BASE + 0x2000
.set WP, 0x10000
.set SMEP_BIT, 20
.set SMAP_BIT, 21
.set AC, 0x40000

main:
    call new_space
    mov %rax, %r12
    mov %rax, %rdi
    call new_frame
    movb $0xc3, (%rax)          # RET
    lea PRESENT + WRITABLE(%rax), %rdx
    bts $63, %rdx
    movabs $NX_PAGE, %rsi
    call map_page
    call new_frame
    movb $0xc3, (%rax)
    lea PRESENT(%rax), %rdx
    movabs $READ_ONLY, %rsi
    call map_page
    call new_frame
    movb $0xc3, (%rax)
    lea PRESENT + WRITABLE + USER(%rax), %rdx
    movabs $USERS, %rsi
    call map_page
    mov %r12, %cr3
    call no_execute
    call write_protect
    .if SMEP
    call no_execution_of_users
    .endif
    .if SMAP
    call no_access_to_users
    .endif
    ret

.macro attempt_call register:req
    mov %rsp, %rbp
    attempt call *\register
    mov %rbp, %rsp
.endm

no_execute:
    movabs $NX_PAGE, %rbx
    attempt_call %rbx
    report_fault "run, no-execute"
    mov $0xc0000080, %ecx       # without EFER.NXE the bit is reserved
    rdmsr
    btr $11, %eax
    wrmsr
    mov %cr3, %rcx
    mov %rcx, %cr3
    attempt mov (%rbx), %al
    report_fault "read, NX reserved"
    mov $0xc0000080, %ecx
    rdmsr
    bts $11, %eax
    wrmsr
    mov %cr3, %rcx
    mov %rcx, %cr3
    attempt mov (%rbx), %al
    report_fault "read, no-execute"
    ret

write_protect:
    movabs $READ_ONLY, %rbx
    attempt mov %al, 1(%rbx)
    report_fault "write, WP"
    mov %cr0, %rcx
    and $~WP, %ecx
    mov %rcx, %cr0
    attempt movb $0x77, 1(%rbx)
    report_fault "write, no WP"
    or $WP, %ecx
    mov %rcx, %cr0
    attempt mov %al, 1(%rbx)
    report_fault "write, WP again"
    movzbl 1(%rbx), %eax
    report "written"
    ret

no_execution_of_users:
    movabs $USERS, %rbx
    attempt_call %rbx
    report_fault "run user's, no SMEP"
    mov %cr4, %rcx
    bts $SMEP_BIT, %rcx
    mov %rcx, %cr4
    attempt_call %rbx
    report_fault "run user's, SMEP"
    btr $SMEP_BIT, %rcx
    mov %rcx, %cr4
    attempt_call %rbx
    report_fault "run user's, no SMEP again"
    ret

no_access_to_users:
    movabs $USERS, %rbx
    attempt mov (%rbx), %al
    report_fault "read user's, no SMAP"
    mov %cr4, %rcx
    bts $SMAP_BIT, %rcx
    mov %rcx, %cr4
    attempt mov (%rbx), %al
    report_fault "read user's, SMAP"
    attempt mov %al, (%rbx)
    report_fault "write user's, SMAP"
    call set_ac
    attempt mov (%rbx), %al
    report_fault "read user's, SMAP and AC"
    pushf
    andq $~AC, (%rsp)
    popf
    attempt mov (%rbx), %al
    report_fault "read user's, SMAP again"
    btr $SMAP_BIT, %rcx
    mov %rcx, %cr4
    ret

set_ac:
    pushf
    orq $AC, (%rsp)
    popf
    ret
