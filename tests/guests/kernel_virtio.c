/* The guest's side of virtio-blk over virtio-mmio (virtio 1.2 §4.2, §5.2): it reads sector 0, writes it back
 * in capitals as sector 1, and sleeps by HLT until each request's interrupt comes through the PIC. */
#include "say.h"

asm(".pushsection .note.Xen, \"a\", @note; .balign 4; .long 4, 4, 18; .asciz \"Xen\"; .long _start;"
    ".popsection");
ENTRY32;

typedef unsigned short u16;

#define SLOTS 0xe8000000u
#define MAGIC 0x74726976
#define BLOCK 2
#define SIZE 8
#define VECTOR 0x20

struct desc { u64 address; u32 length; u16 flags, next; };
struct avail { u16 flags, index, ring[SIZE]; };
struct used_entry { u32 id, length; };
struct used { u16 flags, index; struct used_entry ring[SIZE]; };
struct header { u32 type, reserved; u64 sector; };

static struct desc descs[SIZE] __attribute__((aligned(16)));
static volatile struct avail avail __attribute__((aligned(4)));
static volatile struct used used __attribute__((aligned(4)));
static struct header header;
static u8 sector[512], status;
static volatile u32 *device;
static volatile u32 interrupts;

static u8 in8(unsigned short port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

/* --- Interrupts --- */

static u64 idt[256];
asm(".text; entry: pusha; cld; call interrupt; popa; iret");
extern char entry[];

void interrupt(void)
{
	device[0x64 / 4] = device[0x60 / 4]; /* acknowledge what it says: the wire goes down */
	interrupts++;
	out8(0xa0, 0x20);
	out8(0x20, 0x20);
}

static void set_up_interrupts(void)
{
	struct { u16 limit; u32 base; } __attribute__((packed)) idtr = { sizeof(idt) - 1, (u32)idt };
	u32 at = (u32)entry;

	for (int i = 0; i < 16; i++)
		idt[VECTOR + i] = (u64)(at >> 16 << 16 | 0x8e00) << 32 | 0x10 << 16 | (at & 0xffff);
	asm volatile("lidt %0" : : "m"(idtr));
	out8(0x20, 0x11), out8(0x21, VECTOR), out8(0x21, 4), out8(0x21, 1);
	out8(0xa0, 0x11), out8(0xa1, VECTOR + 8), out8(0xa1, 2), out8(0xa1, 1);
	out8(0x21, 0), out8(0xa1, 0);
	say("masks", in8(0x21) | in8(0xa1));
}

/* --- The device --- */

static void find(void)
{
	for (u32 slot = 0; slot < 16; slot++) {
		device = (volatile u32 *)(SLOTS + slot * 0x1000);
		if (device[0] == MAGIC && device[2] == BLOCK)
			return;
	}
	device = 0;
}

static void set_address(u32 offset, const volatile void *address)
{
	device[offset / 4] = (u32)address;
	device[offset / 4 + 1] = 0;
}

static void start(void)
{
	device[0x70 / 4] = 0;
	device[0x70 / 4] = 1 | 2;
	device[0x24 / 4] = 1, device[0x20 / 4] = 1; /* VERSION_1, and nothing else */
	device[0x70 / 4] = 1 | 2 | 8;
	say("features ok", device[0x70 / 4] >> 3 & 1);
	device[0x30 / 4] = 0;
	device[0x38 / 4] = SIZE;
	set_address(0x80, descs);
	set_address(0x90, &avail);
	set_address(0xa0, &used);
	device[0x44 / 4] = 1;
	device[0x70 / 4] = 1 | 2 | 8 | 4;
	say("sectors", device[0x100 / 4]);
}

static void request(u32 type, u32 number)
{
	u16 before = used.index;

	header = (struct header){ type, 0, number };
	descs[0] = (struct desc){ (u32)&header, sizeof(header), 1, 1 };
	descs[1] = (struct desc){ (u32)sector, sizeof(sector), 1 | (type ? 0 : 2), 2 };
	descs[2] = (struct desc){ (u32)&status, 1, 2, 0 };
	status = 0xff;
	avail.ring[avail.index % SIZE] = 0;
	asm volatile("" : : : "memory");
	avail.index++;
	device[0x50 / 4] = 0;
	for (;;) {
		asm volatile("cli" : : : "memory");
		if (used.index != before)
			break;
		asm volatile("sti; hlt" : : : "memory");
	}
	asm volatile("sti" : : : "memory");
	say("status", status);
}

void kernel(void)
{
	set_up_interrupts();
	find();
	say("found", device != 0);
	if (device) {
		start();
		request(0, 0);
		for (int i = 0; i < 16; i++)
			out8(0xe9, sector[i]);
		text("\n");
		for (int i = 0; i < 512; i++)
			if (sector[i] >= 'a' && sector[i] <= 'z')
				sector[i] -= 32;
		request(1, 1);
		say("interrupts", interrupts != 0);
	}
	end();
}
