# The PIT's ticks, first through the PIC (LINT0, virtual wire), then through the IOAPIC's pin 2.
.set X2APIC, 0
.include "long.inc"
.include "apic.inc"

.set IOAPIC, 0xfec00000
.set PIC_BASE, 0x20
.set PIN_VECTOR, 0x50

main:
    call through_pic
    call through_ioapic
    ret

through_pic:
    movq $on_pic, handlers + PIC_BASE * 8
    movq $on_spurious, handlers + (PIC_BASE + 7) * 8
    call enable_apic
    mov $0x700, %eax            # ExtINT: the PIC gives the vector
    apic_write APIC_LINT0
    mov $0x11, %al              # ICW1: edges, a slave, ICW4 follows
    out %al, $0x20
    out %al, $0xa0
    mov $PIC_BASE, %al          # ICW2: vectors
    out %al, $0x21
    mov $PIC_BASE + 8, %al
    out %al, $0xa1
    mov $4, %al                 # ICW3: the slave is on line 2
    out %al, $0x21
    mov $2, %al
    out %al, $0xa1
    mov $1, %al                 # ICW4: 8086
    out %al, $0x21
    out %al, $0xa1
    mov $0xfe, %al              # only IRQ 0
    out %al, $0x21
    in $0x21, %al
    movzbl %al, %eax
    report "mask"
    call start_pit
    call wait_ticks
    mov $0xff, %al
    out %al, $0x21
    mov ticks, %rax
    report "ticks by the PIC"
    ret

through_ioapic:
    movq $on_pin, handlers + PIN_VECTOR * 8
    movq $0, ticks
    mov $0x10000, %eax
    apic_write APIC_LINT0
    mov $1, %ecx                # how many pins: version register, bits 16 to 23
    call ioapic_read
    shr $16, %eax
    movzbl %al, %eax
    report "last pin"
    xor %eax, %eax              # pin 2: to APIC ID 0, fixed, edge
    mov $0x15, %ecx
    call ioapic_write
    mov $PIN_VECTOR, %eax
    mov $0x14, %ecx
    call ioapic_write
    call start_pit
    call wait_ticks
    mov $0x10000 + PIN_VECTOR, %eax
    mov $0x14, %ecx
    call ioapic_write
    mov ticks, %rax
    report "ticks by the IOAPIC"
    ret

# Channel 0, mode 2, one tick each DIVISOR / 1193182 seconds.
start_pit:
    mov $0x34, %al
    out %al, $0x43
    mov $DIVISOR & 255, %al
    out %al, $0x40
    mov $DIVISOR >> 8, %al
    out %al, $0x40
    ret

wait_ticks:
1:  cli
    cmpq $TICKS, ticks
    jae 2f
    sti
    hlt
    jmp 1b
2:  ret

# eax to register ecx, and back: its number goes to offset 0, its value is at 0x10.
ioapic_write:
    mov $IOAPIC, %edx
    mov %ecx, (%rdx)
    mov %eax, 0x10(%rdx)
    ret
ioapic_read:
    mov $IOAPIC, %edx
    mov %ecx, (%rdx)
    mov 0x10(%rdx), %eax
    ret

on_pic:
    call count
    mov $0x20, %al              # EOI
    out %al, $0x20
    ret

on_pin:
    call count
    end_of_interrupt
    ret

count:
    cmpq $TICKS, ticks
    jae 1f
    incq ticks
1:  ret

on_spurious:
    ret

.bss
    .balign 8
ticks: .skip 8
