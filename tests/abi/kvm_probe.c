/* Prints "what=value" for every line that test_kvm_abi.py puts in. */
#include <stddef.h>
#include <stdio.h>
#include <linux/kvm.h>
#include <linux/version.h>
#include <asm/kvm.h>

#define SHOW(name, value) printf("%s=%llu\n", name, (unsigned long long)(value))

int main(void)
{
	SHOW("LINUX_VERSION_CODE", LINUX_VERSION_CODE);
/* PROBES */
	return 0;
}
