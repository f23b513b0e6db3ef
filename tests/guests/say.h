/* For the tiny kernels of these tests: facts on the debug console (port 0xe9), one a line. */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void out8(unsigned short port, u8 value)
{
	asm volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void text(const char *s)
{
	while (*s)
		out8(0xe9, *s++);
}

static void number(u64 value)
{
	int shift = 60;

	while (shift && !(value >> shift & 15))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		out8(0xe9, "0123456789abcdef"[value >> shift & 15]);
}

static void say(const char *name, u64 value)
{
	text(name);
	text("=");
	number(value);
	text("\n");
}

static void say_text(const char *name, const char *value)
{
	text(name);
	text("=");
	text(value);
	text("\n");
}

static void say_map(u64 address, u64 size, u32 type)
{
	text("map=");
	number(address);
	text(" ");
	number(size);
	text(" ");
	number(type);
	text("\n");
}

/* The machine's state, and two of this kernel's own variables: a bss that is not zero, or data that
 * did not arrive, show here. */
static u32 in_bss[2048];
static volatile u32 in_data = 0x600d;

static void say_state(void)
{
	unsigned long cr0, sum = 0;
	unsigned short cs, ds;

	for (int i = 0; i < 2048; i++)
		sum |= in_bss[i];
	asm("mov %%cr0, %0" : "=r"(cr0));
	asm("mov %%cs, %0; mov %%ds, %1" : "=r"(cs), "=r"(ds));
	say("cs", cs);
	say("ds", ds);
	say("paging", (cr0 >> 31) & 1);
	say("data", in_data);
	say("bss", sum);
	in_bss[100] = 1; /* A second boot in the same memory must find it zero again. */
}

static inline void end(void)
{
	out8(0xf4, 1);
	for (;;)
		asm volatile("hlt");
}

/* A call to kernel(eax, ebx) on a stack of our own. */
#define ENTRY32 \
	asm(".bss; .align 16; .skip 4096; stack: .text; .globl _start;" \
	    "_start: mov $stack, %esp; push %ebx; push %eax; call kernel")
#define AT(type, address) ((const type *)(unsigned long)(address))
