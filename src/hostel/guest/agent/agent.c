/* The event loop: one port, many streams, no blocking.
 *
 *   host ⇄ port ⇄ inbox / outbox ⇄ streams ⇄ processes
 *
 * Back-pressure: outputs are read only while the outbox is short (and within the host's credit), and
 * the port is read only while the outbox is not long: a host that asks but never reads costs nothing.
 *
 * Usage: as PID 1 without arguments; or `agent --fd N` on a connected socket, as an ordinary process. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { INBOX = 4 * (HEADER_SIZE + MAX_PAYLOAD), HANGUP_TICK_MS = 10, OWN = 3 };

static int port = -1, signals = -1, init_control = -1;
static bool hung_up;
static uint8_t inbox[INBOX];
static size_t inbox_size;
static struct buffer request;	/* of a request in several frames: what has come so far */
static uint32_t request_stream;

/* Frames from the host */

static size_t count_streams(void)
{
	size_t count = 0;

	for (struct stream *stream = streams; stream; stream = stream->next)
		count++;
	return count;
}

static void open_request(const struct header *header, const uint8_t *message, size_t size)
{
	if (stream_find(header->stream) || !header->stream)
		return;
	if (header->type == TYPE_SETUP)
		setup(header->stream, message, size);
	else if (count_streams() >= MAX_STREAMS)
		send_answer(header->stream, EXIT_FAILED, EAGAIN, "start", "too many commands at once");
	else
		stream_open(header, message, size);
}

static void take_request(const struct header *header, const uint8_t *payload)
{
	if (header->stream != request_stream)
		buffer_free(&request);
	request_stream = header->stream;
	if (!(header->flags & FLAG_MORE) && !buffer_size(&request)) {
		open_request(header, payload, header->length);
		return;
	}
	if (buffer_size(&request) + header->length > MAX_MESSAGE)
		die("request", EMSGSIZE);
	buffer_append(&request, payload, header->length);
	if (header->flags & FLAG_MORE)
		return;
	open_request(header, request.data + request.start, buffer_size(&request));
	buffer_free(&request);
}

/* A new host knows nothing of the streams of one before. */
static void greet(void)
{
	streams_detach();
	buffer_free(&outbox);
	buffer_free(&request);
	say_hello();
}

static void take_frame(const struct header *header, const uint8_t *payload)
{
	struct cursor cursor = { payload, payload + header->length, false };
	struct stream *stream;

	switch (header->type) {
	case TYPE_HELLO:
		greet();
		break;
	case TYPE_EXEC: case TYPE_SETUP: case TYPE_PACK: case TYPE_UNPACK:
		take_request(header, payload);
		break;
	case TYPE_PING:
		send_frame(TYPE_PONG, 0, 0, payload, header->length);
		break;
	case TYPE_SHUTDOWN:
		shut_down(take_u32(&cursor));
	default:
		stream = stream_find(header->stream);
		if (stream)	/* otherwise it has ended meanwhile */
			stream_frame(stream, header, payload);
	}
}

static void take_frames(void)
{
	size_t at = 0;

	while (inbox_size - at >= HEADER_SIZE) {
		struct header header = header_load(inbox + at);
		if (header.length > MAX_PAYLOAD)
			die("frame", EMSGSIZE);
		if (inbox_size - at < HEADER_SIZE + header.length)
			break;
		take_frame(&header, inbox + at + HEADER_SIZE);
		at += HEADER_SIZE + header.length;
	}
	inbox_size -= at;
	memmove(inbox, inbox + at, inbox_size);
}

/* The port */

/* The host's end is closed. A socket stays so; a virtio port may be opened again, and the guest may learn
 * of both only after the next host has greeted (control messages travel on a queue of their own, virtio
 * 1.2 §5.3.6.2). So this only waits: it is the greeting that ends what was before. */
static void hang_up(void)
{
	if (!is_init) {
		streams_detach();
		_exit(0);
	}
	hung_up = true;
	inbox_size = 0;		/* half a frame of the old host's */
}

static void read_port(void)
{
	ssize_t size = read(port, inbox + inbox_size, sizeof inbox - inbox_size);

	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size <= 0) {
		hang_up();
		return;
	}
	inbox_size += size;
	take_frames();
}

static void write_port(void)
{
	while (buffer_size(&outbox)) {
		ssize_t size = write(port, outbox.data + outbox.start, buffer_size(&outbox));
		if (size < 0 && errno == EPIPE)
			hang_up();
		if (size <= 0)
			return;
		buffer_consume(&outbox, size);
	}
	if (outbox.room > OUTBOX_HIGH)
		buffer_free(&outbox);
}

/* A virtio port whose host end is closed reports POLLHUP; what was sent before may still be read. */
static void port_ready(short events)
{
	if (events & POLLIN)
		read_port();
	else if (events & (POLLHUP | POLLERR))
		hang_up();
}

static void look_for_host(void)
{
	struct pollfd state = { port, POLLIN | POLLOUT, 0 };

	hung_up = poll(&state, 1, 0) < 0 || state.revents & POLLHUP;
}

/* The loop */

static void take_signals(void)
{
	struct signalfd_siginfo info;

	while (read(signals, &info, sizeof info) == sizeof info) {
		if (info.ssi_signo == SIGCHLD)
			streams_reap();
		else if (is_init)	/* as BusyBox's init has it */
			shut_down(info.ssi_signo == SIGTERM || info.ssi_signo == SIGINT ? HOW_REBOOT : HOW_POWEROFF);
		else
			_exit(0);
	}
}

static void stream_ready(struct stream *stream, int slot, short events)
{
	if (!events)
		return;
	if (slot == 3)
		stream_status(stream);
	else if (slot > 0)
		stream_read(stream, slot);
	else
		stream_write(stream);
}

/* Four descriptors a stream: stdin, stdout, stderr, status; -1 where nothing is wanted. */
static void stream_poll(const struct stream *stream, struct pollfd *at)
{
	bool has_input = stream->fd[0] >= 0 && buffer_size(&stream->input);

	at[0] = (struct pollfd){ has_input ? stream->fd[0] : -1, POLLOUT, 0 };
	for (int channel = 1; channel < 3; channel++)
		at[channel] = (struct pollfd){ stream_wants(stream, channel) ? stream->fd[channel] : -1, POLLIN, 0 };
	at[3] = (struct pollfd){ stream->status, POLLIN, 0 };
}

static void turn(void)
{
	static struct pollfd polled[OWN + 4 * MAX_STREAMS];
	struct stream *stream;
	struct pollfd *at = polled + OWN;
	bool take = buffer_size(&outbox) < OUTBOX_HIGH, give = buffer_size(&outbox) && !hung_up;

	polled[0] = (struct pollfd){ hung_up ? -1 : port, (take ? POLLIN : 0) | (give ? POLLOUT : 0), 0 };
	polled[1] = (struct pollfd){ signals, POLLIN, 0 };
	polled[2] = (struct pollfd){ init_control, POLLIN, 0 };
	for (stream = streams; stream; stream = stream->next, at += 4)
		stream_poll(stream, at);
	if (poll(polled, at - polled, hung_up ? HANGUP_TICK_MS : -1) < 0 && errno != EINTR)
		die("poll", errno);
	/* New streams come first in the list, so these are served before any is added. */
	at = polled + OWN;
	for (stream = streams; stream; stream = stream->next, at += 4)
		for (int slot = 0; slot < 4; slot++)
			stream_ready(stream, slot, at[slot].revents);
	if (polled[1].revents)
		take_signals();
	if (polled[2].revents)
		take_init_request(init_control);
	port_ready(polled[0].revents);
	streams_finish();
	if (hung_up)
		look_for_host();
	if (!hung_up)
		write_port();
}

static void watch_signals(void)
{
	static const int numbers[] = { SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGPWR };
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
		sigaddset(&set, numbers[i]);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		die("signalfd", errno);
}

int main(int argc, char **argv)
{
	is_init = getpid() == 1;
	if (!is_init && (argc != 3 || strcmp(argv[1], "--fd"))) {
		fprintf(stderr, "usage: agent --fd N\n");
		return 2;
	}
	umask(0);	/* modes are as the host says; commands get 022 */
	boot();
	watch_signals();
	port = is_init ? find_port() : atoi(argv[2]);
	init_control = open_init_control();
	fcntl(port, F_SETFD, FD_CLOEXEC);
	fcntl(port, F_SETFL, fcntl(port, F_GETFL) | O_NONBLOCK);
	for (;;)
		turn();
}
