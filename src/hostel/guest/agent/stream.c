/* A stream: one child process and its three channels.
 *
 * stdin:  host --DATA--> input (≤ WINDOW) --> pipe; what the pipe took goes back as CREDIT.
 * output: pipe --> outbox as DATA, never more than the host's credit.
 *
 * EXIT is sent when the stream's own process has ended; the stream lives until what that one had written
 * has been read. Background processes that still hold the pipes are left alone; the amount to read is
 * fixed at that moment, so that they cannot keep the stream open.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"

enum { TTY_REST = 256 << 10, CREDIT_STEP = WINDOW / 8, PIPE_SIZE = 256 << 10 };

struct stream *streams;

struct stream *stream_find(uint32_t id)
{
	for (struct stream *stream = streams; stream; stream = stream->next)
		if (stream->id == id && !stream->detached)
			return stream;
	return NULL;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void non_blocking(int fd)
{
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* ours: the end the agent keeps; theirs: the child's. */
static bool make_pipe(int *ours, int *theirs, bool agent_writes)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return false;
	*ours = ends[agent_writes];
	*theirs = ends[!agent_writes];
	non_blocking(*ours);
	fcntl(*ours, F_SETPIPE_SZ, PIPE_SIZE);	/* fewer turns of the loop; refusal does no harm */
	return true;
}

/* TIOCGPTPEER opens the other side without a path, whatever /dev is in the guest's root. */
static bool make_tty(struct stream *stream, struct child *child, uint32_t rows, uint32_t columns)
{
	struct winsize size = { .ws_row = rows, .ws_col = columns };
	int unlock = 0, master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (master < 0)
		return false;
	stream->fd[1] = master;
	if (ioctl(master, TIOCSPTLCK, &unlock) || ioctl(master, TIOCSWINSZ, &size))
		return false;
	child->tty = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (child->tty < 0)
		return false;
	/* A command may close its terminal and end, or open /dev/tty, later: while this side is held, the
	 * master does not say EIO, and is not closed, which would be a SIGHUP. */
	stream->terminal = fcntl(child->tty, F_DUPFD_CLOEXEC, 3);
	non_blocking(master);
	stream->fd[0] = fcntl(master, F_DUPFD_CLOEXEC, 3);
	return stream->fd[0] >= 0;
}

static bool make_channels(struct stream *stream, struct child *child, const struct header *header,
			  const uint8_t *message, size_t size)
{
	bool has_input = header->type != TYPE_PACK;

	if (!make_pipe(&stream->status, &child->status, false))
		return false;
	if (header->type == TYPE_EXEC) {
		struct cursor cursor = { message, message + size, false };
		uint32_t flags = take_u32(&cursor), rows = take_u32(&cursor), columns = take_u32(&cursor);

		stream->tty = flags & EXEC_TTY;
		if (stream->tty)
			return make_tty(stream, child, rows, columns);
		has_input = flags & EXEC_STDIN;
	}
	if (has_input && !make_pipe(&stream->fd[0], &child->fd[0], true))
		return false;
	return make_pipe(&stream->fd[1], &child->fd[1], false)
	    && make_pipe(&stream->fd[2], &child->fd[2], false);
}

static pid_t start_child(struct child *child, const struct header *header,
			 const uint8_t *message, size_t size)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	child_self(child);
	if (header->type == TYPE_EXEC)
		child_exec(message, size);
	if (header->type == TYPE_PACK)
		child_pack(message, size);
	child_unpack(message, size);
}

static void stream_free(struct stream *stream)
{
	for (int channel = 0; channel < 3; channel++)
		close_fd(&stream->fd[channel]);
	close_fd(&stream->status);
	close_fd(&stream->terminal);
	buffer_free(&stream->input);
	free(stream);
}

void stream_open(const struct header *header, const uint8_t *message, size_t size)
{
	struct child child = { { -1, -1, -1 }, -1, -1 };
	struct stream *stream = calloc(1, sizeof *stream);

	if (!stream)
		die("memory", ENOMEM);
	*stream = (struct stream){ .id = header->stream, .fd = { -1, -1, -1 }, .status = -1,
				   .terminal = -1, .credit = { 0, WINDOW, WINDOW } };
	bool made = make_channels(stream, &child, header, message, size);
	stream->pid = made ? start_child(&child, header, message, size) : -1;
	int error = errno;

	for (int channel = 0; channel < 3; channel++)
		close_fd(&child.fd[channel]);
	close_fd(&child.status);
	close_fd(&child.tty);
	if (stream->tty)	/* a terminal has one output */
		send_frame(TYPE_EOF, stream->id, CHANNEL_STDERR, NULL, 0);
	if (stream->pid < 0) {
		send_answer(header->stream, EXIT_FAILED, error, "start", strerror(error));
		stream_free(stream);
		return;
	}
	stream->next = streams;
	streams = stream;
}

static void close_input(struct stream *stream, bool tell)
{
	close_fd(&stream->fd[0]);
	buffer_free(&stream->input);
	if (tell && !stream->detached)
		send_frame(TYPE_EOF, stream->id, CHANNEL_STDIN, NULL, 0);
}

static void give_credit(struct stream *stream, size_t size)
{
	struct buffer payload = { 0 };

	stream->input_done += size;
	if (stream->input_done < CREDIT_STEP)
		return;
	put_u32(&payload, stream->input_done);
	send_frame(TYPE_CREDIT, stream->id, CHANNEL_STDIN, payload.data, buffer_size(&payload));
	buffer_free(&payload);
	stream->input_done = 0;
}

void stream_write(struct stream *stream)
{
	while (buffer_size(&stream->input)) {
		ssize_t done = write(stream->fd[0], stream->input.data + stream->input.start,
				     buffer_size(&stream->input));
		if (done < 0 && errno == EAGAIN)
			return;
		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0) {
			close_input(stream, true);
			return;
		}
		buffer_consume(&stream->input, done);
		give_credit(stream, done);
	}
	buffer_free(&stream->input);
	if (stream->input_eof && !stream->tty)
		close_input(stream, false);
}

static void take_input(struct stream *stream, const uint8_t *data, size_t size)
{
	if (stream->fd[0] < 0 || stream->input_eof)
		return;
	if (buffer_size(&stream->input) + size > WINDOW) {
		close_input(stream, true);	/* the host broke its window */
		return;
	}
	stream->mid_line = size && data[size - 1] != '\n';
	buffer_append(&stream->input, data, size);
	stream_write(stream);
}

static void end_input(struct stream *stream)
{
	/* A terminal has no end of file but the character that says so (termios(3), VEOF): after a half line
	 * the first one hands that over, the second one is the end. */
	if (stream->tty && !stream->input_eof)
		take_input(stream, (const uint8_t *)"\4\4", stream->mid_line ? 2 : 1);
	stream->input_eof = true;
	if (stream->fd[0] >= 0 && !stream->tty && !buffer_size(&stream->input))
		close_input(stream, false);
}

static void close_output(struct stream *stream, int channel)
{
	if (stream->tty)
		close_fd(&stream->fd[0]);
	close_fd(&stream->fd[channel]);
	send_frame(TYPE_EOF, stream->id, channel, NULL, 0);
}

void stream_frame(struct stream *stream, const struct header *header, const uint8_t *payload)
{
	struct cursor cursor = { payload, payload + header->length, false };
	int channel = header->channel;

	switch (header->type) {
	case TYPE_DATA:
		if (channel == CHANNEL_STDIN)
			take_input(stream, payload, header->length);
		break;
	case TYPE_EOF:
		if (channel == CHANNEL_STDIN)
			end_input(stream);
		else if (channel <= CHANNEL_STDERR && stream->fd[channel] >= 0)
			close_output(stream, channel);
		break;
	case TYPE_CREDIT:
		if (channel == CHANNEL_STDOUT || channel == CHANNEL_STDERR)
			stream->credit[channel] += take_u32(&cursor);
		break;
	case TYPE_RESIZE: {
		struct winsize size = { .ws_row = take_u32(&cursor), .ws_col = take_u32(&cursor) };
		if (stream->tty && !cursor.bad)
			ioctl(stream->fd[1], TIOCSWINSZ, &size);
		break;
	}
	case TYPE_SIGNAL: {
		uint32_t number = take_u32(&cursor);
		/* The child makes its own session first of all; until then it has no group of its own. */
		if (!stream->ended && !cursor.bad && kill(-stream->pid, number))
			kill(stream->pid, number);
		break;
	}
	}
}

bool stream_wants(const struct stream *stream, int channel)
{
	bool any = stream->credit[channel] || (stream->ended && !stream->left[channel]);

	return stream->fd[channel] >= 0 && any && buffer_size(&outbox) < OUTBOX_LOW;
}

void stream_read(struct stream *stream, int channel)
{
	size_t most = stream->credit[channel] < MAX_PAYLOAD ? stream->credit[channel] : MAX_PAYLOAD;

	if (stream->ended && stream->left[channel] < most)
		most = stream->left[channel];
	uint8_t *at = buffer_reserve(&outbox, HEADER_SIZE + most);
	ssize_t size = most ? read(stream->fd[channel], at + HEADER_SIZE, most) : 0;

	if (size < 0 && (errno == EINTR || (errno == EAGAIN && !stream->ended)))
		return;
	if (size <= 0) {	/* the end; EIO from a terminal that nobody holds */
		close_output(stream, channel);
		return;
	}
	struct header header = { .length = size, .stream = stream->id, .type = TYPE_DATA, .channel = channel };
	header_store(at, &header);
	outbox.end += HEADER_SIZE + size;
	stream->credit[channel] -= size;
	if (stream->ended)
		stream->left[channel] -= size;
}

void stream_status(struct stream *stream)
{
	ssize_t size = read(stream->status, stream->failure + stream->failure_size,
			    sizeof stream->failure - 1 - stream->failure_size);

	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size > 0)
		stream->failure_size += size;
	else
		close_fd(&stream->status);
}

static void report(struct stream *stream, int status)
{
	const char *step = stream->failure + sizeof(int32_t);
	int32_t error;

	if (stream->failure_size > sizeof error) {
		memcpy(&error, stream->failure, sizeof error);
		send_exit(stream->id, EXIT_FAILED, error, step, step + strlen(step) + 1);
	} else if (WIFSIGNALED(status)) {
		send_exit(stream->id, EXIT_SIGNAL, WTERMSIG(status), "", "");
	} else {
		send_exit(stream->id, EXIT_CODE, WEXITSTATUS(status), "", "");
	}
}

static void child_ended(struct stream *stream, int status)
{
	stream->ended = true;
	close_input(stream, false);
	close_fd(&stream->terminal);
	while (stream->status >= 0)	/* its only writer is gone: this ends */
		stream_status(stream);
	if (!stream->detached)
		report(stream, status);
	for (int channel = 1; channel < 3; channel++) {
		int size = 0;
		if (stream->fd[channel] < 0)
			continue;
		/* A terminal's count lags behind: its buffers are bounded, and read() flushes them. */
		if (!stream->tty)
			ioctl(stream->fd[channel], FIONREAD, &size);
		stream->left[channel] = stream->tty ? TTY_REST : size;
	}
}

void streams_reap(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (struct stream *stream = streams; stream; stream = stream->next)
			if (stream->pid == pid && !stream->ended)
				child_ended(stream, status);
}

/* Reads what the process left behind; poll() would wait for those that hold its pipes. */
static bool drain(struct stream *stream)
{
	for (int channel = 1; channel < 3; channel++)
		while (stream_wants(stream, channel))
			stream_read(stream, channel);
	return stream->fd[1] < 0 && stream->fd[2] < 0;
}

/* Takes the streams that are over out of the list. */
void streams_finish(void)
{
	for (struct stream **at = &streams; *at;) {
		struct stream *stream = *at;
		if (!stream->ended || !(stream->detached || drain(stream))) {
			at = &stream->next;
			continue;
		}
		*at = stream->next;
		stream_free(stream);
	}
}

/* The host is gone: what a hang-up of its terminal line would do. */
void streams_detach(void)
{
	for (struct stream *stream = streams; stream; stream = stream->next) {
		if (!stream->ended)
			kill(-stream->pid, SIGHUP);
		stream->detached = true;
		for (int channel = 0; channel < 3; channel++)
			close_fd(&stream->fd[channel]);
		close_fd(&stream->terminal);
		buffer_free(&stream->input);
	}
}
