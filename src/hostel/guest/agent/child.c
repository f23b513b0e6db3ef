/* What a child does before it becomes the command. It may block; it never returns to the loop.
 *
 * A failure before exec goes through the status pipe, which exec closes: i32 errno, step, text. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#ifndef SYS_close_range
#define SYS_close_range 436
#endif

enum { STATUS = 3, MAX_GROUPS = 65536 };

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

_Noreturn void child_fail(int error, const char *step, const char *text)
{
	struct buffer report = { 0 };
	int32_t number = error;
	char line[512];

	snprintf(line, sizeof line, "%s%s%s", text, *text ? ": " : "", strerror(error));
	buffer_append(&report, &number, sizeof number);
	buffer_append(&report, step, strlen(step) + 1);
	buffer_append(&report, line, strlen(line) + 1);
	if (write(STATUS, report.data, buffer_size(&report)) < 0)
		_exit(126);
	_exit(127);
}

static void close_others(void)
{
	if (!syscall(SYS_close_range, STATUS + 1, ~0U, 0))
		return;
	for (int fd = STATUS + 1; fd < 4096; fd++)
		close(fd);
}

static void default_signals(void)
{
	struct sigaction action = { .sa_handler = SIG_DFL };
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &action, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/* Own session, own descriptors 0 to 2 and the status pipe, nothing else of the agent's. The agent's
 * own 0 to 2 are always open, so none of the child's can be among them. */
struct child *child_self(struct child *child)
{
	setsid();
	default_signals();
	command_limits();
	umask(022);
	for (int fd = 0; fd < 3; fd++) {
		int from = child->tty >= 0 ? child->tty : child->fd[fd];
		if (from < 0)
			from = open("/dev/null", O_RDWR);
		if (from < 0 || dup2(from, fd) < 0)
			_exit(126);
	}
	if (child->status != STATUS)
		dup2(child->status, STATUS);
	fcntl(STATUS, F_SETFD, FD_CLOEXEC);
	close_others();
	return child;
}

/* The user. The tables are read by hand: a static libc cannot load NSS modules. */

struct user {
	const char *name, *home, *shell;
	uid_t uid;
	gid_t gid;
	gid_t groups[MAX_GROUPS];
	size_t group_count;
};

static bool number_of(const char *text, uint32_t *number)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	*number = value;
	return *text >= '0' && *text <= '9' && !*end && value < UINT32_MAX;
}

static bool find_passwd(struct user *user, const char *name, const uint32_t *uid)
{
	FILE *file = fopen("/etc/passwd", "re");
	struct passwd *entry;
	bool found = false;

	while (file && !found && (entry = fgetpwent(file))) {
		found = name ? !strcmp(entry->pw_name, name) : entry->pw_uid == *uid;
		if (!found)
			continue;
		user->name = strdup(entry->pw_name);
		user->home = strdup(entry->pw_dir);
		user->shell = strdup(entry->pw_shell);
		user->uid = entry->pw_uid;
		user->gid = entry->pw_gid;
	}
	if (file)
		fclose(file);
	return found;
}

static bool is_member(const struct group *group, const char *name)
{
	for (char **member = group->gr_mem; name && *member; member++)
		if (!strcmp(*member, name))
			return true;
	return false;
}

/* The gid of a group by name, or every group that lists the user. */
static bool find_groups(struct user *user, const char *name)
{
	FILE *file = fopen("/etc/group", "re");
	struct group *entry;
	bool found = false;

	while (file && !found && (entry = fgetgrent(file))) {
		if (name && !strcmp(entry->gr_name, name)) {
			user->gid = entry->gr_gid;
			found = true;
		} else if (!name && is_member(entry, user->name) && user->group_count < MAX_GROUPS) {
			user->groups[user->group_count++] = entry->gr_gid;
		}
	}
	if (file)
		fclose(file);
	return found;
}

static void no_such(const char *what, const char *name)
{
	char text[256];

	snprintf(text, sizeof text, "the guest has no %s '%s'", what, name);
	child_fail(ENOENT, "user", text);
}

/* "name", "uid", either with ":group" or ":gid". A uid that the guest does not list has the gid of
 * the same number, not root's group. */
static void resolve_user(struct user *user, char *text)
{
	char *group = strchr(text, ':');
	uint32_t number;

	if (group)
		*group++ = 0;
	if (number_of(text, &number)) {
		if (!find_passwd(user, NULL, &number))
			user->uid = user->gid = number;
	} else if (!find_passwd(user, text, NULL)) {
		if (strcmp(text, "root"))	/* who needs no list to be known */
			no_such("user", text);
		user->uid = user->gid = 0;
	}
	if (!group) {
		user->groups[user->group_count++] = user->gid;
		find_groups(user, NULL);
	} else if (number_of(group, &number)) {
		user->gid = number;
	} else if (!find_groups(user, group)) {
		no_such("group", group);
	}
}

static void take_user(struct user *user, struct cursor *cursor)
{
	const char *text = take_string(cursor);

	user->uid = take_u32(cursor);
	user->gid = take_u32(cursor);
	for (uint32_t count = take_u32(cursor); count && !cursor->bad; count--) {
		gid_t gid = take_u32(cursor);
		if (user->group_count < MAX_GROUPS)
			user->groups[user->group_count++] = gid;
	}
	if (*text)
		resolve_user(user, strdup(text));
}

static void become(const struct user *user)
{
	if (setgroups(user->group_count, user->groups) && geteuid() == 0)
		child_fail(errno, "user", "setgroups");
	if (setresgid(user->gid, user->gid, user->gid))
		child_fail(errno, "user", "setgid");
	if (setresuid(user->uid, user->uid, user->uid))
		child_fail(errno, "user", "setuid");
}

static void login_environment(struct user *user)
{
	if (!user->home && !find_passwd(user, NULL, &(uint32_t){ user->uid }))
		return;
	setenv("HOME", user->home, 0);
	setenv("USER", user->name, 0);
	setenv("LOGNAME", user->name, 0);
	setenv("SHELL", *user->shell ? user->shell : "/bin/sh", 0);
}

/* execve along PATH, as execvpe(3) but without its fallback to a shell: what cannot be executed is
 * an error that the caller wants to see. */
static int execute(const char **argv)
{
	const char *path = getenv("PATH"), *end;
	int error = ENOENT;
	char file[4096];

	if (strchr(argv[0], '/')) {
		execve(argv[0], (char **)argv, environ);
		return errno;
	}
	for (path = path ? path : default_path; *argv[0]; path = end + 1) {
		end = strchrnul(path, ':');
		int size = snprintf(file, sizeof file, "%.*s%s%s", (int)(end - path), path,
				    end > path ? "/" : "", argv[0]);
		if (size < (int)sizeof file)
			execve(file, (char **)argv, environ);
		if (errno == EACCES)
			error = EACCES;
		else if (errno != ENOENT && errno != ENOTDIR)
			return errno;
		if (!*end)
			break;
	}
	return error;
}

static void take_terminal(const struct user *user)
{
	if (fchown(0, user->uid, -1) && geteuid() == 0)
		child_fail(errno, "tty", "chown");
	if (ioctl(0, TIOCSCTTY, 0))
		child_fail(errno, "tty", "TIOCSCTTY");
}

_Noreturn void child_exec(const uint8_t *message, size_t size)
{
	static struct user user;
	struct cursor cursor = { message, message + size, false };
	uint32_t flags = take_u32(&cursor);

	take_u32(&cursor);
	take_u32(&cursor);
	take_user(&user, &cursor);
	const char *directory = take_string(&cursor);
	const char **argv = take_strings(&cursor);
	environ = (char **)take_strings(&cursor);
	if (cursor.bad || !argv[0])
		child_fail(EBADMSG, "request", "");
	if (flags & EXEC_LOGIN_ENV)
		login_environment(&user);
	if (flags & EXEC_TTY)
		take_terminal(&user);
	become(&user);
	if (*directory && chdir(directory))
		child_fail(errno, "directory", directory);
	child_fail(execute(argv), "exec", argv[0]);
}
