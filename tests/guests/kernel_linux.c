/* What a Linux sees that is entered by the 64-bit boot protocol. */
#include "say.h"

asm(".text; .globl _start; _start: mov %rsi, %rdi; call kernel");

static u32 at32(const u8 *page, u32 offset)
{
	return *(const u32 *)(page + offset);
}

void kernel(const u8 *page)
{
	say("zero_page", (unsigned long)page);
	say_state();
	say("boot_flag", at32(page, 0x1fe) & 0xffff);
	say("header", at32(page, 0x202));
	say("loader", page[0x210]);
	say_text("cmdline", AT(char, at32(page, 0x228)));
	say("rsdp", at32(page, 0x70));
	say("initrd_size", at32(page, 0x21c));
	if (at32(page, 0x21c)) {
		say("initrd_end", at32(page, 0x218) + at32(page, 0x21c));
		say("initrd", *AT(u32, at32(page, 0x218)));
	}
	say("seed_type", *AT(u32, at32(page, 0x250) + 8));
	say("seed_size", *AT(u32, at32(page, 0x250) + 12));
	for (u32 i = 0; i < page[0x1e8]; i++) {
		const u8 *entry = page + 0x2d0 + 20 * i;
		say_map(*(u64 *)entry, *(u64 *)(entry + 8), at32(entry, 16));
	}
	end();
}
