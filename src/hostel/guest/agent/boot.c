/* What PID 1 does before there is a host to talk to, and at the end.
 *
 * All of this is in the path of a boot: nothing sleeps that can be waited for. A step that fails is
 * printed on the console as "hostel-agent: step: error", where the host finds it, and the machine is
 * powered off. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum { PORT_TIMEOUT_MS = 30000, PORT_TICK_MS = 20, COMMAND_FILES = 1024, MOST_FILES = 1 << 19 };

/* linux/netlink.h, which a musl tool chain may lack. */
enum { KOBJECT_UEVENT = 15, KERNEL_GROUP = 1 };
struct netlink_address {
	sa_family_t family;
	unsigned short pad;
	uint32_t pid, groups;
};

bool is_init;
static uint64_t started;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_BOOTTIME, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static void say(const char *step, const char *text)
{
	char line[512];
	int size = snprintf(line, sizeof line, "hostel-agent: %s: %s\n", step, text);
	int fd = is_init ? open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC) : 2;

	if (fd < 0)
		fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && write(fd, line, size < (int)sizeof line ? size : (int)sizeof line - 1) < 0)
		return;
	if (fd > 2)
		close(fd);
}

static _Noreturn void leave(uint32_t how)
{
	if (!is_init)
		_exit(0);
	sync();
	reboot(how == HOW_REBOOT ? RB_AUTOBOOT : RB_POWER_OFF);
	for (;;)	/* PID 1 must not return: the kernel would panic */
		pause();
}

_Noreturn void die(const char *step, int error)
{
	say(step, strerror(error));
	if (!is_init)
		_exit(1);
	leave(HOW_POWEROFF);
}

/* Descriptors 0 to 2 exist, whatever console the kernel found. */
static void open_standard(void)
{
	int fd = open("/dev/null", O_RDWR);

	if (fd < 0)
		fd = open("/", O_RDONLY);
	while (fd >= 0 && fd < 2)
		fd = dup(fd);
	if (fd > 2)
		close(fd);
}

static void mount_one(const char *type, const char *target, unsigned long flags, const char *data)
{
	char step[64];

	mkdir(target, 0755);
	if (!mount(type, target, type, flags, data) || errno == EBUSY)
		return;
	snprintf(step, sizeof step, "mount %s", target);
	die(step, errno);
}

static void mount_system(void)
{
	mount_one("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_one("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
	mount_one("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_one("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	mount_one("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/self/fd/0", "/dev/stdin");
	symlink("/proc/self/fd/1", "/dev/stdout");
	symlink("/proc/self/fd/2", "/dev/stderr");
}

/* An appended signature (kernel: Documentation/admin-guide/module-signing.rst): the signature itself, then
 * 12 bytes that end in its size, big endian, then a marker. */
static size_t unsigned_size(const uint8_t *module, size_t size)
{
	static const char marker[] = "~Module signature appended~\n";
	size_t tail = sizeof marker - 1 + 12;
	const uint8_t *end = module + size;

	if (size < tail || memcmp(end - (sizeof marker - 1), marker, sizeof marker - 1))
		return size;
	const uint8_t *at = end - (sizeof marker - 1) - 4;
	size_t length = (size_t)at[0] << 24 | at[1] << 16 | at[2] << 8 | at[3];
	return length <= size - tail ? size - tail - length : size;
}

/* The modules come with the kernel from the same host, so that checking their signatures proves nothing;
 * it takes four fifths of the time of loading them. A kernel that insists on it gets them whole. */
static int insert_module(int fd)
{
	struct stat info;

	if (fstat(fd, &info))
		return -1;
	void *module = mmap(NULL, info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (module == MAP_FAILED)
		return -1;
	int failed = syscall(SYS_init_module, module, unsigned_size(module, info.st_size), "");
	int error = errno;
	munmap(module, info.st_size);
	if (failed && (error == EKEYREJECTED || error == ENOKEY || error == EPERM))
		return syscall(SYS_finit_module, fd, "", 0);
	errno = error;
	return failed;
}

/* The host has put them in order and unpacked them. ENODEV: a driver whose device is not there. */
static void load_module(const char *name)
{
	char path[256], step[300];
	int fd;

	snprintf(path, sizeof path, MODULE_DIRECTORY "/%s", name);
	snprintf(step, sizeof step, "load module %s", name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die(step, errno);
	if (insert_module(fd) && errno != EEXIST && errno != ENODEV)
		die(step, errno);
	close(fd);
	unlink(path);	/* gives its memory back */
}

static void load_modules(void)
{
	FILE *list = fopen(MODULE_LIST, "re");
	char name[200];

	while (list && fgets(name, sizeof name, list)) {
		name[strcspn(name, "\n")] = 0;
		load_module(name);
	}
	if (list)
		fclose(list);
}

/* 524288 is what systemd gives; the agent itself needs four for each of its streams. */
static void raise_limits(void)
{
	struct rlimit limit = { MOST_FILES, MOST_FILES };

	setrlimit(RLIMIT_NOFILE, &limit);
}

/* A command starts with the soft limit that select(2) needs. Called in a child. */
void command_limits(void)
{
	struct rlimit limit = { COMMAND_FILES, MOST_FILES };

	if (is_init)
		setrlimit(RLIMIT_NOFILE, &limit);
}

void boot(void)
{
	started = now();
	open_standard();
	if (!is_init)
		return;
	reboot(RB_DISABLE_CAD);
	raise_limits();
	mount_system();
	load_modules();
	network_basics();
}

/* Where poweroff(8) and reboot(8) turn to if there is no systemd: a FIFO that takes the requests of
 * System V's init (initreq.h: magic, command, run level, of 384 bytes in all). */

enum { INIT_MAGIC = 0x03091969, INIT_RUN_LEVEL = 1 };

int open_init_control(void)
{
	if (!is_init || mkfifo("/run/initctl", 0600))
		return -1;
	return open("/run/initctl", O_RDWR | O_NONBLOCK | O_CLOEXEC);
}

void take_init_request(int fd)
{
	int32_t request[96];

	if (read(fd, request, sizeof request) != sizeof request || request[0] != INIT_MAGIC)
		return;
	if (request[1] == INIT_RUN_LEVEL && request[2] == '0')
		shut_down(HOW_POWEROFF);
	if (request[1] == INIT_RUN_LEVEL && request[2] == '6')
		shut_down(HOW_REBOOT);
}

/* The port: no udev here, so its name is looked up in sysfs. The driver learns names from the host,
 * some time after it is loaded, and announces each by a uevent. */

static bool has_name(int class, const char *port)
{
	char path[300], name[64] = "";
	int fd;

	snprintf(path, sizeof path, "%s/name", port);
	fd = openat(class, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t size = read(fd, name, sizeof name - 1);
	close(fd);
	name[strcspn(name, "\n")] = 0;
	return size > 0 && !strcmp(name, PORT_NAME);
}

static int open_port(int class, const char *port)
{
	char path[300], number[32] = "";
	unsigned major, minor;

	snprintf(path, sizeof path, "/dev/%s", port);
	int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd >= 0 || errno != ENOENT)
		return fd;
	snprintf(path, sizeof path, "%s/dev", port);
	int file = openat(class, path, O_RDONLY | O_CLOEXEC);
	ssize_t size = file < 0 ? -1 : read(file, number, sizeof number - 1);
	if (file >= 0)
		close(file);
	if (size <= 0 || sscanf(number, "%u:%u", &major, &minor) != 2)
		return -1;
	mknod("/dev/hostel.agent", S_IFCHR | 0600, makedev(major, minor));
	return open("/dev/hostel.agent", O_RDWR | O_NONBLOCK | O_CLOEXEC);
}

static int scan_ports(void)
{
	DIR *class = opendir("/sys/class/virtio-ports");
	struct dirent *item;
	int fd = -1;

	while (class && fd < 0 && (item = readdir(class)))
		if (item->d_name[0] != '.' && has_name(dirfd(class), item->d_name))
			fd = open_port(dirfd(class), item->d_name);
	if (class)
		closedir(class);
	return fd;
}

static int open_uevents(void)
{
	struct netlink_address address = { .family = AF_NETLINK, .groups = KERNEL_GROUP };
	int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, KOBJECT_UEVENT);

	if (fd >= 0)
		bind(fd, (struct sockaddr *)&address, sizeof address);
	return fd;
}

int find_port(void)
{
	struct pollfd uevents = { .fd = open_uevents(), .events = POLLIN };
	uint64_t end = now() + PORT_TIMEOUT_MS * 1000000ULL;
	char drop[4096];
	int fd;

	while ((fd = scan_ports()) < 0) {
		if (now() > end)
			die("find the port " PORT_NAME, ENODEV);
		poll(&uevents, 1, PORT_TICK_MS);
		while (recv(uevents.fd, drop, sizeof drop, 0) > 0)
			;
	}
	if (uevents.fd >= 0)
		close(uevents.fd);
	return fd;
}

void say_hello(void)
{
	struct buffer hello = { 0 };
	struct utsname name;
	struct sysinfo info;

	uname(&name);
	sysinfo(&info);
	put_u32(&hello, VERSION);
	put_u32(&hello, sysconf(_SC_NPROCESSORS_ONLN));
	put_u64(&hello, (uint64_t)info.totalram * info.mem_unit);
	put_u64(&hello, started);
	put_u64(&hello, now());
	put_string(&hello, name.release);
	put_string(&hello, name.machine);
	send_frame(TYPE_HELLO, 0, 0, hello.data, buffer_size(&hello));
	buffer_free(&hello);
}

/* File systems on disks are left clean; the others lose nothing. */
static void unmount_disks(void)
{
	FILE *mounts = fopen("/proc/mounts", "re");
	char line[1024], source[256], target[512];

	while (mounts && fgets(line, sizeof line, mounts)) {
		if (sscanf(line, "%255s %511s", source, target) != 2 || strncmp(source, "/dev/", 5))
			continue;
		if (umount2(target, 0))
			mount(NULL, target, NULL, MS_REMOUNT | MS_RDONLY, NULL);
	}
	if (mounts)
		fclose(mounts);
}

_Noreturn void shut_down(uint32_t how)
{
	if (is_init) {
		kill(-1, SIGKILL);
		sync();
		unmount_disks();
	}
	leave(how);
}
