# CPUID: an exit in VMX operation, always (SDM vol. 3C §25.1.2). What is said holds on every x86-64 host.
.include "long.inc"

main:
    mov $-1, %rbx
    mov $-1, %rcx
    mov $-1, %rdx
    xor %eax, %eax
    cpuid
    shr $32, %rbx               # the upper halves become 0
    shr $32, %rcx
    shr $32, %rdx
    or %rbx, %rcx
    or %rcx, %rdx
    mov %rdx, %rax
    report "upper halves"
    mov $1, %eax
    cpuid
    mov %edx, %eax
    and $0x0700a179, %eax       # FPU PSE TSC MSR PAE CX8 PGE CMOV FXSR SSE SSE2 (PSE36 and others aside)
    report "features"
    mov $0x80000001, %eax
    cpuid
    mov %edx, %eax
    and $0x20100800, %eax       # LM NX SYSCALL
    report "extended"
    ret
