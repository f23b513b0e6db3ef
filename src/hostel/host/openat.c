/*
 * Preloaded into virtiofsd (see preload.py): two flags of openat(2) that it hands on from the guest.
 *
 * O_NOATIME: a guest's overlayfs opens every file of its lower layer with it. The host refuses that to
 * all but the file's owner (open(2)), so that an ordinary user's guest could read none of root's files.
 * Without it the guest's wish is met all the same where the share is read-only: nothing is written.
 *
 * O_CREAT without a mode: QEMU's virtiofsd opens a file that turns out to exist with the flags of the
 * guest's CREATE. glibc's fortified openat then ends the process.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <sys/syscall.h>

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
