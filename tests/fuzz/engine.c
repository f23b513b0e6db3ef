/* A small coverage-guided fuzzer for C code of the agent's (wire.c, dhcp.c beside this give run()), for gcc: -fsanitize-coverage=trace-pc tells of each
 * edge, and an input that meets a new one joins the corpus. Findings are AddressSanitizer's and UBSan's.
 *
 *   NAME SECONDS FOUND_DIR CORPUS_DIR        mutate until the time is over
 *   NAME RUNS- CORPUS_DIR                    replay, then so many mutations, always the same ones
 */
#include <dirent.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { EDGES = 1 << 14, MOST_INPUTS = 4096, MOST = 2048 };

struct input {
	uint8_t *data;
	size_t size;
};

static uint8_t seen[EDGES];
static bool is_new;
static uintptr_t previous;
static struct input inputs[MOST_INPUTS];
static size_t count;
static uint64_t dice = 88172645463325252ull;

__attribute__((no_sanitize_coverage)) void __sanitizer_cov_trace_pc(void)
{
	uintptr_t here = (uintptr_t)__builtin_return_address(0);
	size_t edge = (here ^ previous << 1) % EDGES;

	previous = here;
	if (!seen[edge])
		seen[edge] = is_new = true;
}

void run(const uint8_t *data, size_t size);

static uint64_t roll(uint64_t sides)
{
	dice ^= dice << 13;
	dice ^= dice >> 7;
	dice ^= dice << 17;
	return sides ? dice % sides : 0;
}

static void keep(const uint8_t *data, size_t size, const char *folder)
{
	if (count == MOST_INPUTS)
		return;
	inputs[count] = (struct input){ memcpy(malloc(size + 1), data, size), size };
	if (folder) {
		char path[4096];
		snprintf(path, sizeof path, "%s/new-%05zu", folder, count);
		FILE *file = fopen(path, "wb");
		if (file) {
			fwrite(data, 1, size, file);
			fclose(file);
		}
	}
	count++;
}

static void load_corpus(const char *folder)
{
	struct dirent **names;
	int n = scandir(folder, &names, NULL, alphasort);	/* always in the same order */
	static uint8_t data[MOST];

	for (int i = 0; i < n; i++) {
		char path[4096];
		snprintf(path, sizeof path, "%s/%s", folder, names[i]->d_name);
		FILE *file = names[i]->d_name[0] == '.' ? NULL : fopen(path, "rb");
		if (file) {
			size_t size = fread(data, 1, sizeof data, file);
			fclose(file);
			run(data, size);
			keep(data, size, NULL);
		}
		free(names[i]);
	}
	if (n >= 0)
		free(names);
}

static size_t mutate(uint8_t *data, size_t size)
{
	static const uint32_t numbers[] = { 0, 1, 5, 0x7f, 0xff, 0xffff, 1u << 31, ~0u };

	for (uint64_t i = roll(5) + 1; i; i--) {
		uint64_t at = roll(size + 1), kind = roll(4);
		if (kind == 0 && at < size) {
			data[at] = roll(256);
		} else if (kind == 1 && at + 4 <= size) {
			memcpy(data + at, &numbers[roll(8)], 4);
		} else if (kind == 2 && at < size) {
			memmove(data + at, data + at + 1, size - at - 1);
			size--;
		} else if (size + 8 <= MOST) {
			memmove(data + at + 8, data + at, size - at);
			uint64_t fresh = roll(0) ^ dice;
			memcpy(data + at, &fresh, 8);
			size += 8;
		}
	}
	return size;
}

static void play(const char *folder)
{
	static uint8_t data[MOST];
	const struct input *chosen = &inputs[roll(count)];
	size_t size = chosen->size;

	memcpy(data, chosen->data, size);
	size = mutate(data, size);
	is_new = false;
	previous = 0;
	run(data, size);
	if (is_new)
		keep(data, size, folder);
}

int main(int argc, char **argv)
{
	bool replay = argc == 3;
	size_t runs = 0;

	if (argc != 3 && argc != 4)
		return 2;
	load_corpus(argv[argc - 1]);
	if (!count)
		keep((const uint8_t *)"", 0, NULL);
	time_t until = time(NULL) + atol(argv[1]);
	for (size_t most = atol(argv[1]); replay ? runs < most : time(NULL) < until; runs++)
		play(replay ? NULL : argv[2]);
	printf("%zu runs, %zu inputs\n", runs, count);
	return 0;
}
