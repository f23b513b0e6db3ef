/* A kernel that is entered by its PVH note, in 32-bit mode. */
#include "say.h"

asm(".pushsection .note.Xen, \"a\", @note; .balign 4; .long 4, 4, 18; .asciz \"Xen\"; .long _start;"
    ".popsection");
ENTRY32;

struct start {
	u32 magic, version, flags, modules;
	u64 modlist, cmdline, rsdp, map;
	u32 map_entries;
};
struct module { u64 address, size, cmdline; };
struct map { u64 address, size; u32 type, reserved; };

void kernel(u32 eax, const struct start *start)
{
	const struct map *map = AT(struct map, start->map);

	say("magic", start->magic);
	say_state();
	say("version", start->version);
	say_text("cmdline", AT(char, start->cmdline));
	say("rsdp", start->rsdp);
	say("modules", start->modules);
	if (start->modules) {
		const struct module *module = AT(struct module, start->modlist);
		say("module", *AT(u32, module->address));
		say("module_size", module->size);
	}
	for (u32 i = 0; i < start->map_entries; i++)
		say_map(map[i].address, map[i].size, map[i].type);
	end();
}
