/* The steps of SETUP, done one after the other by the agent itself, since they change its own root.
 * The first that fails ends it; EXIT then names the step. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

int make_directories(const char *path, mode_t mode)
{
	char part[PATH_MAX];
	struct stat info;

	if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part) {
		errno = ENAMETOOLONG;
		return -1;
	}
	for (char *at = part + 1; (at = strchr(at, '/')); *at++ = '/') {
		*at = 0;
		if (mkdir(part, 0755) && errno != EEXIST && stat(part, &info))
			return -1;
	}
	if (mkdir(part, mode) && (errno != EEXIST || stat(part, &info)))
		return -1;
	return 0;
}

/* mount(2): a bind mount ignores all flags but MS_REC; read-only takes a remount. */
static int step_mount(struct cursor *cursor)
{
	const char *source = take_string(cursor), *target = take_string(cursor);
	const char *type = take_string(cursor);
	unsigned long flags = take_u32(cursor);
	const char *data = take_string(cursor);

	if (cursor->bad)
		return 0;
	if (!(flags & MS_BIND))
		return mount(source, target, type, flags, data);
	if (mount(source, target, NULL, flags & (MS_BIND | MS_REC), NULL))
		return -1;
	flags &= ~MS_REC;
	return flags == MS_BIND ? 0 : mount(NULL, target, NULL, flags | MS_REMOUNT, NULL);
}

static int step_mkdir(struct cursor *cursor)
{
	const char *path = take_string(cursor);
	mode_t mode = take_u32(cursor);

	return cursor->bad ? 0 : make_directories(path, mode);
}

static int write_file(const char *path, int flags, mode_t mode, const char *data, size_t size)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, mode);
	int error = 0;

	if (fd < 0 && errno == ENOENT && !unlink(path))		/* it was a link to nowhere */
		fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | flags, mode);
	if (fd < 0)
		return -1;
	if (write(fd, data, size) != (ssize_t)size)
		error = errno ? errno : EIO;
	if (close(fd) && !error)
		error = errno;
	errno = error;
	return error ? -1 : 0;
}

static int step_write(struct cursor *cursor)
{
	const char *path = take_string(cursor);
	mode_t mode = take_u32(cursor);
	bool append = take_u32(cursor);
	uint32_t size;
	const char *data = take_blob(cursor, &size);

	return cursor->bad ? 0 : write_file(path, append ? O_APPEND : O_TRUNC, mode, data, size);
}

static int step_remove(struct cursor *cursor)
{
	const char *path = take_string(cursor);

	return cursor->bad || !unlink(path) || errno == ENOENT ? 0 : -1;
}

static int step_touch(struct cursor *cursor)
{
	const char *path = take_string(cursor);

	return cursor->bad || !access(path, F_OK) ? 0 : write_file(path, 0, 0644, "", 0);
}

static int step_symlink(struct cursor *cursor)
{
	const char *target = take_string(cursor), *path = take_string(cursor);

	return cursor->bad || !symlink(target, path) || errno == EEXIST ? 0 : -1;
}

static int step_device(struct cursor *cursor)
{
	const char *path = take_string(cursor);
	mode_t mode = take_u32(cursor);
	unsigned major = take_u32(cursor), minor = take_u32(cursor);

	return cursor->bad || !mknod(path, mode, makedev(major, minor)) || errno == EEXIST ? 0 : -1;
}

static int step_hostname(struct cursor *cursor)
{
	const char *name = take_string(cursor);

	return cursor->bad ? 0 : sethostname(name, strlen(name));
}

static int step_wait(struct cursor *cursor)
{
	const char *path = take_string(cursor);
	uint32_t milliseconds = take_u32(cursor);
	struct timespec pause = { .tv_nsec = 2000000 };

	for (uint32_t waited = 0; !cursor->bad && access(path, F_OK); waited += 2) {
		if (waited >= milliseconds) {
			errno = ETIMEDOUT;
			return -1;
		}
		nanosleep(&pause, NULL);
	}
	return 0;
}

static int carry(const char *mount_point, const char *root)
{
	char target[PATH_MAX];

	if (snprintf(target, sizeof target, "%s%s", root, mount_point) >= (int)sizeof target)
		return -1;
	mkdir(target, 0755);	/* an empty image may lack it; on a read-only one mount() says so */
	return mount(mount_point, target, NULL, MS_MOVE, NULL);
}

/* What switch_root(8) does. The old root stays below, unreachable. */
static int step_root(struct cursor *cursor)
{
	const char *root = take_string(cursor);
	const char **kept = take_strings(cursor);
	int error = 0;

	for (const char **at = kept; !cursor->bad && *at && !error; at++)
		error = carry(*at, root);
	free(kept);
	if (cursor->bad || error)
		return error;
	return chdir(root) || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/") ? -1 : 0;
}

static int (*const steps[])(struct cursor *) = {
	[STEP_MOUNT] = step_mount, [STEP_MKDIR] = step_mkdir, [STEP_TOUCH] = step_touch,
	[STEP_SYMLINK] = step_symlink, [STEP_DEVICE] = step_device, [STEP_WRITE] = step_write,
	[STEP_HOSTNAME] = step_hostname, [STEP_WAIT] = step_wait, [STEP_ROOT] = step_root,
	[STEP_REMOVE] = step_remove, [STEP_LINK] = step_link, [STEP_DHCP] = step_dhcp,
};

static struct buffer said;	/* what the host is told when all steps are done */

void setup_says(const char *line)
{
	buffer_append(&said, line, strlen(line));
}

static void done(uint32_t stream)
{
	buffer_append(&said, "", 1);
	send_answer(stream, EXIT_CODE, 0, "", (const char *)said.data + said.start);
}

void setup(uint32_t stream, const uint8_t *message, size_t size)
{
	struct cursor cursor = { message, message + size, false };

	buffer_free(&said);
	for (uint32_t count = take_u32(&cursor); count && !cursor.bad; count--) {
		uint32_t op = take_u32(&cursor);
		const char *label = take_string(&cursor);

		if (op >= sizeof steps / sizeof *steps || !steps[op])
			cursor.bad = true;
		else if (steps[op](&cursor) && !cursor.bad) {
			send_answer(stream, EXIT_FAILED, errno, label, strerror(errno));
			return;
		}
	}
	if (cursor.bad)
		send_answer(stream, EXIT_FAILED, EBADMSG, "request", strerror(EBADMSG));
	else
		done(stream);
}
