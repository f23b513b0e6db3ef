/*
 * PID 1 of the testbed's initramfs: from bare kernel to the host's root.
 *
 *   /modules/list  ->  insmod each       virtio_pci, virtio_console, virtiofs, overlay and what they need
 *   virtiofs       ->  /lower            the host's root, read-only
 *   tmpfs          ->  /rw/{upper,work}  what is written in the testbed stays here
 *   overlay        ->  /root             both; then chroot and exec the arguments of the command line
 *
 * Rule: nothing but this. The rest (more modules, /dev, /proc, the command) is done in Python by
 * testbed_guest.py, which runs from the host's root.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void require(int result, const char *what)
{
	if (result == 0)
		return;
	printf("testbed: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	sleep(1);
	_exit(1); /* the end of PID 1 is a panic, and a panic ends the testbed (panic=-1, -no-reboot) */
}

static void load(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	require(fd < 0, path);
	if (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
		require(-1, path);
	close(fd);
}

static void load_modules(void)
{
	char line[256];
	FILE *list = fopen("/modules/list", "r");

	require(list == NULL, "/modules/list");
	while (fgets(line, sizeof(line), list)) {
		line[strcspn(line, "\n")] = '\0';
		load(line);
	}
	fclose(list);
}

static void make_root(void)
{
	require(mount("root", "/lower", "virtiofs", MS_RDONLY, NULL), "mount virtiofs");
	require(mount("rw", "/rw", "tmpfs", 0, "size=75%,mode=755"), "mount tmpfs");
	require(mkdir("/rw/upper", 0755) | mkdir("/rw/work", 0755), "mkdir upper, work");
	require(mount("root", "/root", "overlay", 0, "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"),
		"mount overlay");
}

int main(int argc, char **argv)
{
	(void)argc;
	load_modules();
	make_root();
	/* An initramfs cannot be pivoted out of: move the new root over it, as switch_root does. */
	require(chdir("/root"), "chdir");
	require(mount(".", "/", NULL, MS_MOVE, NULL), "move the root");
	require(chroot("."), "chroot");
	require(chdir("/"), "chdir");
	execv(argv[1], argv + 1);
	require(-1, argv[1] ? argv[1] : "no program on the command line");
}
