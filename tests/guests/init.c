/* PID 1 of a test's initramfs: says what it sees, then does what the command line asks for. */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

static char text[1 << 16];

static const char *contents(const char *path)
{
	int fd = open(path, O_RDONLY);
	ssize_t size = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);

	close(fd);
	text[size < 0 ? 0 : size] = 0;
	return text;
}

int main(void)
{
	int console = open("/dev/console", O_RDWR);

	dup2(console, 0);
	dup2(console, 1);
	mkdir("/proc", 0555);
	mkdir("/sys", 0555);
	mount("proc", "/proc", "proc", 0, 0);
	mount("sys", "/sys", "sysfs", 0, 0);
	printf("clock=%s", contents("/sys/devices/system/clocksource/clocksource0/current_clocksource"));
	printf("cpus=%ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	printf("siblings=%s", contents("/sys/devices/system/cpu/cpu0/topology/package_cpus_list"));
	printf("threads=%s", contents("/sys/devices/system/cpu/cpu0/topology/core_cpus_list"));
	contents("/proc/cpuinfo");
	printf("x2apic=%d\n", strstr(text, " x2apic") != 0);
	printf("deadline=%d\n", strstr(text, " tsc_deadline_timer") != 0);
	printf("done\n");
	fflush(stdout);
	contents("/proc/cmdline");
	if (strstr(text, "test.panic"))
		return 1;
	reboot(strstr(text, "test.reboot") ? RB_AUTOBOOT : RB_POWER_OFF);
	for (;;)
		pause();
}
