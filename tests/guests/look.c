/* /init of a Linux guest: shows what the kernel made of the machine, and ends it.
 * The last word of the command line says how: poweroff, reboot or panic. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

static char buffer[65536];

static void show(const char *path)
{
	int fd = open(path, O_RDONLY);
	ssize_t size = fd < 0 ? 0 : read(fd, buffer, sizeof buffer - 1);

	printf("== %s\n%.*s\n", path, (int)size, buffer);
}

static void list(const char *path)
{
	DIR *directory = opendir(path);
	struct dirent *entry;

	printf("== %s\n", path);
	while (directory && (entry = readdir(directory)))
		printf("%s\n", entry->d_name);
}

int main(void)
{
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, 0);
	mount("sys", "/sys", "sysfs", 0, 0);
	show("/proc/iomem");
	show("/proc/ioports");
	show("/sys/devices/system/cpu/online");
	show("/sys/devices/system/clocksource/clocksource0/current_clocksource");
	list("/sys/bus/pci/devices");
	list("/sys/bus/platform/devices");
	list("/sys/bus/acpi/devices");
	show("/proc/cmdline");
	fflush(stdout);
	if (strstr(buffer, "reboot"))
		reboot(RB_AUTOBOOT);
	if (strstr(buffer, "poweroff"))
		reboot(RB_POWER_OFF);
	return 0; /* The end of init is a panic. */
}
