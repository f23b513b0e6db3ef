/* A multiboot 1 kernel that behaves as its command line says, on the first serial port. */
#include "say.h"

extern u8 _start[];

__attribute__((section(".header"), used)) static const struct {
	u32 magic, flags, checksum;
} header = {0x1badb002, 2, -(0x1badb002 + 2)};

ENTRY32;

struct info {
	u32 flags, lower, upper, device, cmdline;
};

#define COM1 0x3f8

static inline u8 in8(unsigned short port)
{
	u8 value;

	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static void print(const char *s)
{
	for (; *s; s++) {
		while (!(in8(COM1 + 5) & 0x20))
			;
		out8(COM1, *s);
	}
}

static int asked(const char *cmdline, const char *word)
{
	for (; *cmdline; cmdline++) {
		const char *a = cmdline, *b = word;

		while (*b && *a == *b)
			a++, b++;
		if (!*b)
			return 1;
	}
	return 0;
}

/* RAM outlives a reset; where nothing is loaded it is not written either. */
static int first_time(void)
{
	volatile u32 *mark = (volatile u32 *)0x900000;
	u32 before = *mark;

	*mark = 0x600d600d;
	return before != 0x600d600d;
}

void kernel(u32 magic, const struct info *info)
{
	const char *cmdline = AT(char, info->cmdline);
	static const struct {
		unsigned short limit;
		u32 base;
	} __attribute__((packed)) no_idt = {0, 0};

	print("hello\r\n");
	if (asked(cmdline, "off"))
		asm volatile("outw %0, %1" : : "a"((unsigned short)0x2000), "Nd"((unsigned short)0x604));
	if (asked(cmdline, "panic"))
		print("Kernel panic - not syncing: as told\r\n");
	if (asked(cmdline, "halted"))
		print("---[ end Kernel panic - not syncing: as told ]---\r\n");
	if (asked(cmdline, "reset") || (asked(cmdline, "once") && first_time()))
		out8(0xcf9, 0x06);
	if (asked(cmdline, "fault"))
		asm volatile("lidt %0; ud2" : : "m"(no_idt));
	if (asked(cmdline, "exit"))
		out8(0xf4, 0x21);
	while (asked(cmdline, "flood"))
		print("0123456789012345678901234567890123456789012345678901234567890123456789\r\n");
	for (;;) {
		char text[2] = {0, 0};

		while (!(in8(COM1 + 5) & 1))
			;
		text[0] = in8(COM1);
		print(text);
	}
}
