/*
 * Preloaded into virtiofsd (see preload.py): two flags of openat(2) that it hands on from the guest.
 *
 * O_NOATIME: a guest's overlayfs opens every file of its lower layer with it. The host refuses that to
 * all but the file's owner (open(2)), so that an ordinary user's guest could read none of root's files.
 * Without it the guest's wish is met all the same where the share is read-only: nothing is written.
 *
 * O_CREAT without a mode: QEMU's virtiofsd opens a file that turns out to exist with the flags of the
 * guest's CREATE. glibc's fortified openat then ends the process.
 *
 * And what an ordinary user's virtiofsd may not do. Where HOSTEL_SHARE names a descriptor (launch.py), "/"
 * is that instead of chroot(2)'s: nothing is above it, so ".." stays in it. And it has no capabilities to
 * set (libcap-ng): it would end for that.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>

extern char *getenv(const char *name);
extern int atoi(const char *text);
extern int fchdir(int directory);
extern long syscall(long number, ...);

#define NEEDS_MODE(flags) ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE)

#define OPENAT(name)                                                                  \
	int name(int directory, const char *path, int flags, ...)                     \
	{                                                                             \
		unsigned mode = 0;                                                    \
		if (NEEDS_MODE(flags)) {                                              \
			va_list rest;                                                 \
			va_start(rest, flags);                                        \
			mode = va_arg(rest, unsigned);                                \
			va_end(rest);                                                 \
		}                                                                     \
		return syscall(SYS_openat, directory, path, flags & ~O_NOATIME, mode); \
	}

#define OPENAT_WITHOUT_MODE(name)                                                     \
	int name(int directory, const char *path, int flags)                          \
	{                                                                             \
		return syscall(SYS_openat, directory, path, flags & ~(O_NOATIME | O_CREAT)); \
	}

OPENAT(openat)
OPENAT(openat64)
OPENAT_WITHOUT_MODE(__openat_2)
OPENAT_WITHOUT_MODE(__openat64_2)

static int is_root(const char *path)
{
	return path[0] == '/' && !path[1];
}

/* virtiofsd opens its root as "/" with O_PATH; all other paths it opens are those of /proc. */
int open64(const char *path, int flags, ...)
{
	const char *share = getenv("HOSTEL_SHARE");
	unsigned mode = 0;

	if (NEEDS_MODE(flags)) {
		va_list rest;
		va_start(rest, flags);
		mode = va_arg(rest, unsigned);
		va_end(rest);
	}
	if (share && is_root(path))
		return syscall(SYS_openat, atoi(share), ".", flags, 0);
	return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int chdir(const char *path)
{
	const char *share = getenv("HOSTEL_SHARE");

	return share && is_root(path) ? fchdir(atoi(share)) : syscall(SYS_chdir, path);
}

int chroot(const char *path)
{
	const char *share = getenv("HOSTEL_SHARE");

	return share && is_root(path) ? 0 : syscall(SYS_chroot, path);
}

int capng_apply(int set)
{
	static int (*next)(int set);

	if (getenv("HOSTEL_SHARE"))
		return 0;
	if (!next)
		next = dlsym(RTLD_NEXT, "capng_apply");
	return next ? next(set) : -1;
}
