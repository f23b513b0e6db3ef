/* A multiboot 1 kernel that does what is typed on the first serial port: x ends it by the debug exit port,
 * o powers off, f faults; anything else is echoed. */
#include "say.h"

extern u8 _start[];

__attribute__((section(".header"), used)) static const struct {
	u32 magic, flags, checksum;
} header = {0x1badb002, 2, -(0x1badb002 + 2)};

ENTRY32;

#define COM1 0x3f8

static inline u8 in8(unsigned short port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void put(u8 c)
{
	while (!(in8(COM1 + 5) & 0x20))
		;
	out8(COM1, c);
}

void kernel(void)
{
	static const struct {
		unsigned short limit;
		u32 base;
	} __attribute__((packed)) no_idt = {0, 0};

	for (const char *s = "keys>"; *s; s++)
		put(*s);
	for (;;) {
		u8 key;

		while (!(in8(COM1 + 5) & 1))
			;
		key = in8(COM1);
		put(key);
		if (key == 'x')
			out8(0xf4, 0x21);
		if (key == 'o')
			asm volatile("outw %0, %1" : : "a"((unsigned short)0x2000), "Nd"((unsigned short)0x604));
		if (key == 'f')
			asm volatile("lidt %0; ud2" : : "m"(no_idt));
	}
}
