# 32-bit paging, two levels: pages of 4 KiB and 4 MiB, faults, accessed and dirty bits.
.include "flat.inc"

.set WINDOW, 0x40000000         # 1 GiB: pages of 4 KiB
.set BIG, 0x80000000            # 2 GiB: one page of 4 MiB
.set MEMORY, 0x800000           # 8 MiB: nothing else is there

main:
    call make_tables
    mov %cr4, %eax
    or $0x10, %eax              # PSE
    mov %eax, %cr4
    mov $directory, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80010000, %eax        # PG, WP
    mov %eax, %cr0
    say "paging"
    newline
    call windows
    call faults
    call users
    call storm
    mov $MEMORY, %edi
    mov $PAGES * 4096, %esi
    call compare_data
    report "left"
    ret

# The first 16 MiB one to one, in large pages; the window's table, all empty.
make_tables:
    xor %ecx, %ecx
1:  mov %ecx, %eax
    shl $22, %eax
    or $PRESENT + WRITABLE + LARGE, %eax
    mov %eax, directory(, %ecx, 4)
    inc %ecx
    cmp $4, %ecx
    jne 1b
    movl $table + PRESENT + WRITABLE + USER, directory + (WINDOW >> 22) * 4
    movl $MEMORY + PRESENT + WRITABLE + LARGE, directory + (BIG >> 22) * 4
    ret

# The same memory through small pages, turned about, and through the large one.
windows:
    movl $MEMORY + 0x1000 + PRESENT + WRITABLE, table
    movl $MEMORY + PRESENT + WRITABLE, table + 4
    movl $0x1111, WINDOW
    movl $0x2222, WINDOW + 0x1000
    mov BIG, %eax
    report "page 0"
    mov BIG + 0x1000, %eax
    report "page 1"
    movl $0x3333, BIG + 4
    mov WINDOW + 0x1004, %eax
    report "through the large page"
    mov table, %eax
    and $ACCESSED + DIRTY, %eax
    report "small bits"
    mov directory + (BIG >> 22) * 4, %eax
    and $ACCESSED + DIRTY + LARGE, %eax
    report "large bits"
    ret

faults:
    attempt mov WINDOW + 0x2000, %eax
    report_fault "not present"
    movl $MEMORY + 0x2000 + PRESENT, table + 8
    attempt movl $1, WINDOW + 0x2000
    report_fault "read-only"
    mov %cr0, %ecx
    and $~WP, %ecx
    mov %ecx, %cr0
    attempt movl $0x4444, WINDOW + 0x2000
    report_fault "read-only, no WP"
    or $WP, %ecx
    mov %ecx, %cr0
    mov BIG + 0x2000, %eax
    report "written"
    attempt mov 0xc0000000, %eax
    report_fault "no table"
    ret

# Ring 3 in the window: its code copied there.
users:
    movl $on_user_fault, handlers + 6 * 4
    movl $on_user_fault, handlers + 14 * 4
    movl $MEMORY + 0x3000 + PRESENT + WRITABLE + USER, table + 12
    mov $user_code, %esi
    mov $WINDOW + 0x3000, %edi
    mov $user_end - user_code, %ecx
    rep movsb
    mov $WINDOW + 0x3000, %edi
    mov $WINDOW + 0x4000, %esi
    call run_user
    report_fault "ring 3, its own page"
    mov $WINDOW + 0x3000 + user_read - user_code, %edi
    call run_user
    report_fault "ring 3, the kernel's"
    ret

on_user_fault:
    cmpl $USER_CODE, FRAME_CS(%edi)
    jne on_fault
    call note_fault
    jmp end_user

user_code:
    mov $WINDOW + 0x3800, %eax
    movl $0x5555, (%eax)
    push %eax
    ud2
user_read:
    mov WINDOW, %eax
    ud2
user_end:

# Each page of the window is made when it is first touched.
storm:
    movl $on_missing, handlers + 14 * 4
    mov $PAGES, %ecx
    mov $WINDOW + 0x10000, %edi
1:  mov %ecx, (%edi)
    add %edi, 4(%edi)
    add $4096, %edi
    dec %ecx
    jnz 1b
    mov made, %eax
    report "pages made"
    ret

on_missing:
    mov %cr2, %eax
    shr $12, %eax
    and $1023, %eax
    lea -16(%eax), %ecx
    cmp $PAGES, %ecx
    jae unexpected
    shl $12, %ecx
    add $MEMORY + PRESENT + WRITABLE, %ecx
    mov %ecx, table(, %eax, 4)
    incl made
    ret

.bss
    .balign 4096
directory: .skip 4096
table: .skip 4096
made: .skip 4
