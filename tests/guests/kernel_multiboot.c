/* A multiboot 1 kernel. As a flat file it is loaded by the addresses in its header. */
#include "say.h"

extern u8 load_start[], load_end[], bss_end[], _start[];
#ifdef FLAT
#define FLAGS 0x10003
#else
#define FLAGS 0x3
#endif

__attribute__((section(".header"), used)) static const struct {
	u32 magic, flags, checksum;
	const void *header, *load, *load_end, *bss_end, *entry;
} header = {
	0x1badb002, FLAGS, -(0x1badb002 + FLAGS), &header, load_start, load_end, bss_end, _start,
};

ENTRY32;

struct module { u32 start, end, string; };
struct map { u32 size; u64 address, length; u32 type; } __attribute__((packed));
struct info {
	u32 flags, lower, upper, device, cmdline, mods_count, mods, syms[4], map_length, map, drives[2];
	u32 config, name;
};

void kernel(u32 magic, const struct info *info)
{
	const struct module *module = AT(struct module, info->mods);

	say("magic", magic);
	say_state();
	say("flags", info->flags);
	say("lower", info->lower);
	say("upper", info->upper);
	say_text("cmdline", AT(char, info->cmdline));
	say_text("loader", AT(char, info->name));
	if (info->flags & 8) {
		say("module", *AT(u32, module->start));
		say("module_size", module->end - module->start);
		say_text("module_string", AT(char, module->string));
	}
	for (u32 at = info->map; at < info->map + info->map_length; at += AT(struct map, at)->size + 4)
		say_map(AT(struct map, at)->address, AT(struct map, at)->length, AT(struct map, at)->type);
	end();
}
