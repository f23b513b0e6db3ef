/* exit_peer exit|kick PORT LOOPS CODE: the loop of exit.py by a VMM in C; prints nanoseconds a loop.
 *
 * As small as a fair peer can be: the port's device is found in a table and called through a pointer,
 * as a VMM with more than one device does it.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { ENTRY = 0x1000, MEMORY = 2 << 20 };

struct device {
	uint16_t base, size;
	void (*write)(struct device *, uint16_t offset, const void *data, int size);
	long count;
};

static void count_write(struct device *device, uint16_t offset, const void *data, int size)
{
	(void)offset, (void)data, (void)size;
	device->count++;
}

static int check(int result, const char *what)
{
	if (result < 0)
		err(1, "%s", what);
	return result;
}

static void *map(size_t size, int flags, int fd)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (at == MAP_FAILED)
		err(1, "mmap");
	return at;
}

static void load(uint8_t *memory, const char *hex)
{
	for (unsigned byte; sscanf(hex, "%2x", &byte) == 1; hex += 2)
		*memory++ = byte;
}

static void real_mode(int vcpu)
{
	struct kvm_sregs sregs;
	check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.cs.base = sregs.cs.selector = 0;
	check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
}

static void enter(int vcpu)
{
	struct kvm_regs regs = { .rip = ENTRY, .rflags = 2 };
	check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
}

static void add_ioeventfd(int vm, int port)
{
	struct kvm_ioeventfd request = {
		.addr = port, .len = 1, .fd = check(eventfd(0, EFD_CLOEXEC), "eventfd"),
		.flags = KVM_IOEVENTFD_FLAG_PIO,
	};
	check(ioctl(vm, KVM_IOEVENTFD, &request), "KVM_IOEVENTFD");
}

static void serve(int vcpu, struct kvm_run *run, struct device *devices, int count)
{
	for (;;) {
		check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO)
			return;
		for (int i = 0; i < count; i++) {
			struct device *device = &devices[i];
			uint16_t offset = run->io.port - device->base;
			if (offset < device->size)
				device->write(device, offset, (char *)run + run->io.data_offset, run->io.size);
		}
	}
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc != 5)
		errx(2, "usage: exit_peer exit|kick PORT LOOPS CODE");
	int kick = !strcmp(argv[1], "kick"), port = atoi(argv[2]);
	long loops = atol(argv[3]);
	int kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int vm = check(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	uint8_t *memory = map(MEMORY, MAP_SHARED | MAP_ANONYMOUS, -1);
	struct kvm_userspace_memory_region slot = {
		.memory_size = MEMORY, .userspace_addr = (uintptr_t)memory,
	};
	check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
	if (kick)
		add_ioeventfd(vm, port);
	load(memory + ENTRY, argv[4]);
	int vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
	int size = check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = map(size, MAP_SHARED, vcpu);
	real_mode(vcpu);

	struct device device = { .base = port, .size = 1, .write = count_write };
	double elapsed = 0;
	for (int round = 0; round < 2; round++) { /* the first pays for what is made once */
		enter(vcpu);
		device.count = 0;
		double start = now();
		serve(vcpu, run, &device, 1);
		elapsed = now() - start;
	}
	if (device.count != (kick ? 0 : loops))
		errx(1, "%ld exits; exit reason %u", device.count, run->exit_reason);
	printf("%f\n", elapsed / loops);
	return 0;
}
