/* The agent: PID 1 of the guest, and the guest's end of the protocol (protocol.py, docs/agent.md).
 *
 *   agent.c   the event loop: the port, the streams, signals
 *   wire.c    buffers, frames and fields
 *   stream.c  one stream: a child process and its three channels
 *   child.c   what a child does before it becomes the command
 *   files.c   children that pack and unpack trees of files
 *   setup.c   the steps of SETUP
 *   net.c     network interfaces
 *   dhcp.c    a DHCP client; lease.c: its messages
 *   boot.c    what PID 1 does before there is a host to talk to, and at the end
 *
 * Rules: the loop never blocks but in poll(). What may block (files, user look-up) is done in a child,
 * except SETUP, which changes the agent's own root. Every buffer has a bound.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

/* wire.c */

struct buffer {
	uint8_t *data;
	size_t start, end, room;
};

size_t buffer_size(const struct buffer *buffer);
uint8_t *buffer_reserve(struct buffer *buffer, size_t size);
void buffer_append(struct buffer *buffer, const void *data, size_t size);
void buffer_consume(struct buffer *buffer, size_t size);
void buffer_free(struct buffer *buffer);

struct header {
	uint32_t length, stream;
	uint8_t type, channel;
	uint16_t flags;
};

void header_store(uint8_t *at, const struct header *header);
struct header header_load(const uint8_t *at);

/* Takes fields off a payload; once one does not fit, `bad` stays set and all further ones are empty. */
struct cursor {
	const uint8_t *at, *end;
	bool bad;
};

uint32_t take_u32(struct cursor *cursor);
uint64_t take_u64(struct cursor *cursor);
const char *take_blob(struct cursor *cursor, uint32_t *size);
const char *take_string(struct cursor *cursor);
const char **take_strings(struct cursor *cursor);

void put_u32(struct buffer *buffer, uint32_t value);
void put_u64(struct buffer *buffer, uint64_t value);
void put_string(struct buffer *buffer, const char *text);

extern struct buffer outbox;	/* bytes on their way to the host */
void send_frame(uint8_t type, uint32_t stream, uint8_t channel, const void *payload, size_t size);
void send_exit(uint32_t stream, uint32_t kind, uint32_t value, const char *step, const char *text);
void send_answer(uint32_t stream, uint32_t kind, uint32_t value, const char *step, const char *text);

/* stream.c */

enum { OUTBOX_LOW = 256 << 10, OUTBOX_HIGH = 4 << 20, MAX_STREAMS = 1024 };

struct stream {
	struct stream *next;
	uint32_t id;
	pid_t pid;
	bool tty, ended, detached;
	int terminal;		/* the slave side, ours too until the process has ended */
	int fd[3];		/* our ends of stdin, stdout, stderr; -1: closed */
	int status;		/* the child's report of a failure before exec */
	struct buffer input;	/* from the host, not yet written to stdin */
	bool input_eof, mid_line;
	uint32_t input_done;	/* written, not yet credited */
	uint32_t credit[3];	/* what the host has room for */
	size_t left[3];		/* once ended: what is still to be read */
	char failure[1024];	/* i32 errno, step NUL, text NUL */
	size_t failure_size;
};

extern struct stream *streams;
struct stream *stream_find(uint32_t id);
void stream_open(const struct header *header, const uint8_t *message, size_t size);
void stream_frame(struct stream *stream, const struct header *header, const uint8_t *payload);
void stream_write(struct stream *stream);
void stream_read(struct stream *stream, int channel);
void stream_status(struct stream *stream);
bool stream_wants(const struct stream *stream, int channel);
void streams_reap(void);
void streams_finish(void);
void streams_detach(void);

/* child.c: none of these return to the loop */

struct child {
	int fd[3];
	int status;
	int tty;		/* the slave side, or -1 */
};

struct child *child_self(struct child *child);
_Noreturn void child_fail(int error, const char *step, const char *text);
_Noreturn void child_exec(const uint8_t *message, size_t size);

/* files.c */

_Noreturn void child_pack(const uint8_t *message, size_t size);
_Noreturn void child_unpack(const uint8_t *message, size_t size);

/* setup.c */

void setup(uint32_t stream, const uint8_t *message, size_t size);
void setup_says(const char *line);
int make_directories(const char *path, mode_t mode);

/* net.c */

struct address {	/* of either family */
	uint8_t family, size, prefix, bytes[16];
};
struct interface {
	uint32_t index;
	uint8_t mac[6];
	char name[16];
};

int step_link(struct cursor *cursor);
void network_basics(void);
int find_interface(const char *mac, struct interface *interface);
void lower_mtu(const struct interface *interface, uint32_t mtu);
int set_address(uint32_t index, const struct address *address, uint32_t seconds);
int drop_address(uint32_t index, const struct address *address);
int set_route(uint32_t index, const struct address *to, const struct address *gateway, uint32_t metric);

/* dhcp.c */

int step_dhcp(struct cursor *cursor);

/* boot.c */

extern bool is_init;
void boot(void);
void command_limits(void);
int open_init_control(void);
void take_init_request(int fd);
int find_port(void);
void say_hello(void);
_Noreturn void die(const char *step, int error);
_Noreturn void shut_down(uint32_t how);
