/* The agent's wire format, for engine.c. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

_Noreturn void die(const char *what, int error)
{
	fprintf(stderr, "die: %s %d\n", what, error);
	abort();
}

/* Every reader over the input, from its first bytes' choice on; then what was read is sent again. */
void run(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);	/* its end is the heap's: one byte too far is seen */
	memcpy(copy, data, size);
	struct cursor cursor = { .at = copy, .end = copy + size };
	uint32_t length;

	if (size >= HEADER_SIZE) {
		struct header header = header_load(copy);
		uint8_t again[HEADER_SIZE];

		header_store(again, &header);
		if (memcmp(again, copy, HEADER_SIZE))
			abort();
	}
	while (!cursor.bad && cursor.at < cursor.end) {
		switch (take_u32(&cursor) % 5) {
		case 0:
			put_u64(&outbox, take_u64(&cursor));
			break;
		case 1: {
			const char *text = take_string(&cursor);
			put_string(&outbox, text);
			break;
		}
		case 2: {
			const char *blob = take_blob(&cursor, &length);
			send_frame(TYPE_DATA, 1, CHANNEL_STDOUT, blob, length);
			break;
		}
		case 3: {
			const char **list = take_strings(&cursor);
			for (const char **at = list; *at; at++)
				send_exit(1, 0, 0, *at, *at);
			free(list);
			break;
		}
		default:
			buffer_consume(&outbox, buffer_size(&outbox) / 2);
		}
	}
	buffer_free(&outbox);
	free(copy);
}
