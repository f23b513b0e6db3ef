# Threads that move over the guest's processors. At each yield the kernel saves what the thread is (its
# registers), puts it on the next processor's queue, and wakes that one by an IPI; that one loads the
# thread's CR3 and registers and goes on with it, on whatever physical processor it is at that moment.
.include "long.inc"
.include "pages.inc"
.include "user.inc"
.include "apic.inc"
.include "smp.inc"

.set WAKE, 0x41
.set DATA_PAGE, USER_BASE + 0x100000
.set FRAME_SIZE, 176
.set THREAD_CR3, 176            # of a thread: its frame, and then
.set THREAD_LOG, 184            # on which processors it ran, one hexadecimal digit a stay, the last eight
.set THREAD_STAYS, 192
.set THREAD_SIZE, 200
.set QUEUE_SIZE, 128            # of a queue: lock, begin, end, then one byte a thread
.set QUEUE_ITEMS, 16
.set QUEUE_MASK, 63

main:
    movq $on_wake, handlers + WAKE * 8
    movq $on_yield, handlers + 6 * 8
    call enable_apic
    call make_threads
    call start_cpus
    lock incl started
    jmp schedule

cpu_main:
1:  pause
    cmpl $0, started
    je 1b
    jmp schedule

# Thread i begins on processor i % CPUS.
make_threads:
    mov $THREADS, %esi
    call new_block
    mov %rax, %r12
    xor %ebx, %ebx
1:  imul $THREAD_SIZE, %rbx, %rbp
    add $threads, %rbp
    user_address %rax, program
    mov %rax, FRAME_RIP(%rbp)
    movq $USER_CODE, FRAME_CS(%rbp)
    movq $0x202, FRAME_FLAGS(%rbp)
    movq $USER_DATA, FRAME_SS(%rbp)
    lea 1(%rbx), %rax
    mov %rax, FRAME_RDI(%rbp)
    call new_space
    mov %rax, THREAD_CR3(%rbp)
    mov %rax, %rdi
    call map_user_code
    mov %rbx, %rdx
    shl $12, %rdx
    lea PRESENT + WRITABLE + USER(%r12, %rdx), %rdx
    movabs $DATA_PAGE, %rsi
    call map_page
    mov %rbx, %rax
    xor %edx, %edx
    mov $CPUS, %ecx
    div %rcx
    mov %edx, %edi
    mov %ebx, %esi
    call enqueue
    inc %ebx
    cmp $THREADS, %ebx
    jne 1b
    ret

# This processor (edi) looks for a thread, runs it, or sleeps. The stack is empty here.
schedule:
    mov %rsp, %rax
    and $-STACK_SIZE, %rax
    mov (%rax), %edi
    lea STACK_SIZE(%rax), %rsp
1:  cli
    cmpl $THREADS, ended
    je 3f
    call dequeue
    test %esi, %esi
    jns 2f
    sti
    hlt
    jmp 1b
2:  imul $THREAD_SIZE, %rsi, %rbp
    add $threads, %rbp
    mov THREAD_LOG(%rbp), %rax
    shl $4, %eax
    or %edi, %eax
    mov %eax, THREAD_LOG(%rbp)
    incq THREAD_STAYS(%rbp)
    mov %esi, running(, %rdi, 4)
    mov THREAD_CR3(%rbp), %rax
    mov %rax, %cr3
    sub $FRAME_SIZE, %rsp
    mov %rbp, %rsi
    mov %rsp, %rdi
    mov $FRAME_SIZE / 8, %ecx
    rep movsq
    jmp return_to_frame
3:  test %edi, %edi
    jz report_all
4:  hlt
    jmp 4b

# #UD from ring 3 is what a thread asks by: rax 1 to yield, 0 to end.
on_yield:
    cmpq $USER_CODE, FRAME_CS(%rdi)
    jne unexpected
    addq $2, FRAME_RIP(%rdi)
    mov %rsp, %rax
    and $-STACK_SIZE, %rax
    mov (%rax), %ebx            # this processor
    mov running(, %rbx, 4), %r12d
    mov $boot_pml4, %eax        # nobody keeps the tables of a thread that is elsewhere
    mov %rax, %cr3
    imul $THREAD_SIZE, %r12, %rbp
    mov FRAME_RAX(%rdi), %rax
    mov %rdi, %rsi
    lea threads(%rbp), %rdi
    mov $FRAME_SIZE / 8, %ecx
    rep movsq
    test %eax, %eax
    jz 1f
    lea 1(%rbx), %edi           # the next processor
    cmp $CPUS, %edi
    jb 2f
    xor %edi, %edi
2:  mov %r12d, %esi
    call enqueue
    mov $ICR_FIXED + WAKE, %esi
    call send_ipi
    jmp schedule
1:  lock incl ended
    mov $ICR_FIXED + WAKE, %esi # the first processor may wait for this
    xor %edi, %edi
    call send_ipi
    jmp schedule

on_wake:
    end_of_interrupt
    ret

# Thread esi to the end of processor edi's queue.
enqueue:
    call lock_queue
    mov 8(%rdx), %ecx
    mov %sil, QUEUE_ITEMS(%rdx, %rcx)
    inc %ecx
    and $QUEUE_MASK, %ecx
    mov %ecx, 8(%rdx)
    movl $0, (%rdx)
    ret

# esi = the first of processor edi's queue, or -1.
dequeue:
    call lock_queue
    mov 4(%rdx), %ecx
    mov $-1, %esi
    cmp %ecx, 8(%rdx)
    je 1f
    movzbl QUEUE_ITEMS(%rdx, %rcx), %esi
    inc %ecx
    and $QUEUE_MASK, %ecx
    mov %ecx, 4(%rdx)
1:  movl $0, (%rdx)
    ret

lock_queue:
    mov %edi, %edx
    imul $QUEUE_SIZE, %rdx
    add $queues, %rdx
1:  mov $1, %eax
    xchg %eax, (%rdx)
    test %eax, %eax
    jz 2f
    pause
    jmp 1b
2:  ret

report_all:
    mov $boot_pml4, %eax
    mov %rax, %cr3
    mov cpus_up, %eax
    report "processors"
    xor %ebx, %ebx
1:  imul $THREAD_SIZE, %rbx, %rbp
    add $threads, %rbp
    mov %rbx, %rax
    report "thread"
    mov FRAME_RDI(%rbp), %rax
    report "  result"
    mov THREAD_STAYS(%rbp), %rax
    report "  stays"
    mov THREAD_LOG(%rbp), %rax
    report "  last ran on"
    inc %ebx
    cmp $THREADS, %ebx
    jne 1b
    mov $image_end, %edi        # the data pages: the first frames that were taken
    mov $THREADS * 4096, %esi
    call compare_data
    report "data"
    finish 0

.section .user, "ax"
# rdi: the thread's own number, and at last its result. YIELDS stays and one.
program:
    movabs $DATA_PAGE, %rsi
    mov $YIELDS, %ebp
1:  mov $WORK, %ecx
2:  mov %rdi, %rax
    shl $13, %rax
    xor %rax, %rdi
    mov %rdi, %rax
    shr $7, %rax
    xor %rax, %rdi
    mov %edi, %eax
    and $0xff8, %eax
    add %rdi, (%rsi, %rax)
    add (%rsi, %rax), %rdi
    dec %ecx
    jnz 2b
    mov $1, %eax
    ud2
    dec %ebp
    jnz 1b
    xor %eax, %eax
    ud2

.bss
    .balign 8
threads: .skip THREAD_SIZE * THREADS
queues: .skip QUEUE_SIZE * MAX_CPUS
running: .skip 4 * MAX_CPUS
started: .skip 4
ended: .skip 4
