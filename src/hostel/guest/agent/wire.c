/* Buffers, frames and fields. Out of memory is fatal: the buffers are bounded, so it means that the
 * guest itself has none left. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

struct buffer outbox;

size_t buffer_size(const struct buffer *buffer)
{
	return buffer->end - buffer->start;
}

uint8_t *buffer_reserve(struct buffer *buffer, size_t size)
{
	if (buffer->start && buffer->end + size > buffer->room) {
		memmove(buffer->data, buffer->data + buffer->start, buffer_size(buffer));
		buffer->end -= buffer->start;
		buffer->start = 0;
	}
	if (buffer->end + size > buffer->room) {
		size_t room = (buffer->end + size) * 2;
		uint8_t *data = realloc(buffer->data, room);
		if (!data)
			die("memory", ENOMEM);
		buffer->data = data;
		buffer->room = room;
	}
	return buffer->data + buffer->end;
}

void buffer_append(struct buffer *buffer, const void *data, size_t size)
{
	if (!size)
		return;
	memcpy(buffer_reserve(buffer, size), data, size);
	buffer->end += size;
}

void buffer_consume(struct buffer *buffer, size_t size)
{
	buffer->start += size;
	if (buffer->start == buffer->end)
		buffer->start = buffer->end = 0;
}

void buffer_free(struct buffer *buffer)
{
	free(buffer->data);
	*buffer = (struct buffer){ 0 };
}

static void store(uint8_t *at, uint64_t value, int size)
{
	for (int i = 0; i < size; i++)
		at[i] = value >> (8 * i);
}

static uint64_t load(const uint8_t *at, int size)
{
	uint64_t value = 0;
	for (int i = 0; i < size; i++)
		value |= (uint64_t)at[i] << (8 * i);
	return value;
}

void header_store(uint8_t *at, const struct header *header)
{
	store(at, header->length, 4);
	store(at + 4, header->stream, 4);
	at[8] = header->type;
	at[9] = header->channel;
	store(at + 10, header->flags, 2);
}

struct header header_load(const uint8_t *at)
{
	return (struct header){
		.length = load(at, 4), .stream = load(at + 4, 4),
		.type = at[8], .channel = at[9], .flags = load(at + 10, 2),
	};
}

static const uint8_t *take(struct cursor *cursor, size_t size)
{
	static const uint8_t nothing[8];
	const uint8_t *at = cursor->at;

	if (cursor->bad || size > (size_t)(cursor->end - at)) {
		cursor->bad = true;
		return nothing;
	}
	cursor->at += size;
	return at;
}

uint32_t take_u32(struct cursor *cursor)
{
	return load(take(cursor, 4), 4);
}

uint64_t take_u64(struct cursor *cursor)
{
	return load(take(cursor, 8), 8);
}

const char *take_blob(struct cursor *cursor, uint32_t *size)
{
	*size = take_u32(cursor);
	const char *text = (const char *)take(cursor, (size_t)*size + 1);

	if (!cursor->bad && text[*size])
		cursor->bad = true;
	if (!cursor->bad)
		return text;
	*size = 0;
	return "";
}

const char *take_string(struct cursor *cursor)
{
	uint32_t size;
	return take_blob(cursor, &size);
}

const char **take_strings(struct cursor *cursor)
{
	uint32_t count = take_u32(cursor);

	/* Each takes at least five bytes: a count that cannot be true costs no memory. */
	if (count > (size_t)(cursor->end - cursor->at) / 5) {
		cursor->bad = true;
		count = 0;
	}
	const char **list = calloc(count + 1, sizeof *list);
	if (!list)
		die("memory", ENOMEM);
	for (uint32_t i = 0; i < count; i++)
		list[i] = take_string(cursor);
	return list;
}

void put_u32(struct buffer *buffer, uint32_t value)
{
	store(buffer_reserve(buffer, 4), value, 4);
	buffer->end += 4;
}

void put_u64(struct buffer *buffer, uint64_t value)
{
	store(buffer_reserve(buffer, 8), value, 8);
	buffer->end += 8;
}

void put_string(struct buffer *buffer, const char *text)
{
	size_t size = strlen(text);
	put_u32(buffer, size);
	buffer_append(buffer, text, size + 1);
}

void send_frame(uint8_t type, uint32_t stream, uint8_t channel, const void *payload, size_t size)
{
	struct header header = { .length = size, .stream = stream, .type = type, .channel = channel };

	header_store(buffer_reserve(&outbox, HEADER_SIZE + size), &header);
	outbox.end += HEADER_SIZE;
	buffer_append(&outbox, payload, size);
}

void send_exit(uint32_t stream, uint32_t kind, uint32_t value, const char *step, const char *text)
{
	struct buffer payload = { 0 };

	put_u32(&payload, kind);
	put_u32(&payload, value);
	put_string(&payload, step);
	put_string(&payload, text);
	send_frame(TYPE_EXIT, stream, 0, payload.data, buffer_size(&payload));
	buffer_free(&payload);
}

/* EXIT of a stream that has no process: nothing comes on its channels. */
void send_answer(uint32_t stream, uint32_t kind, uint32_t value, const char *step, const char *text)
{
	send_frame(TYPE_EOF, stream, CHANNEL_STDOUT, NULL, 0);
	send_frame(TYPE_EOF, stream, CHANNEL_STDERR, NULL, 0);
	send_exit(stream, kind, value, step, text);
}
