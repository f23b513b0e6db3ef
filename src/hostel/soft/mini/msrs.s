# MSRs: what is written is read back; what there is not, or may not be, is a fault.
.include "long.inc"

.macro read_back number:req, value:req, label:req
    mov $\number, %ecx
    movabs $\value, %rax
    mov %rax, %rdx
    shr $32, %rdx
    wrmsr
    xor %eax, %eax
    xor %edx, %edx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    report "\label"
.endm

main:
    read_back 0xc0000081, 0x0018000812345678, "STAR"
    read_back 0xc0000082, 0xffff800000123456, "LSTAR"
    read_back 0xc0000084, 0x47700, "SFMASK"
    read_back 0xc0000102, 0x00007fffdeadbeef, "KERNEL_GS_BASE"
    read_back 0xc0000101, 0x0000123456789000, "GS_BASE"
    read_back 0xc0000100, 0x80010, "FS_BASE"
    read_back 0x174, 0x10, "SYSENTER_CS"
    read_back 0x176, 0x0000000000100000, "SYSENTER_EIP"
    read_back 0x277, 0x0007040600070406, "PAT"
    movl $0x600d, 0x80020
    mov %fs:16, %eax
    report "through FS"
    swapgs
    mov $0xc0000101, %ecx
    rdmsr
    shl $32, %rdx
    or %rdx, %rax
    report "GS_BASE swapped"
    mov $0xc0000080, %ecx
    rdmsr
    and $0xfff, %eax
    report "EFER"
    movabs $BEYOND, %rdx
    mov %edx, %eax
    shr $32, %rdx
    mov $0xc0000082, %ecx
    attempt wrmsr
    report_fault "LSTAR not canonical"
    mov $0xc0000080, %ecx
    mov $0xd01, %eax
    mov $1, %edx                # a reserved bit
    attempt wrmsr
    report_fault "EFER reserved"
    mov $0xdeadbeef, %ecx
    attempt rdmsr
    report_fault "no such MSR"
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %rbx
    mov $1000, %ecx
1:  dec %ecx
    jnz 1b
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %rbx, %rax
    seta %al
    movzbl %al, %eax
    report "time goes on"
    ret

.set BEYOND, 0x0000800000000000
