"""``/dev/kvm`` itself: what this KVM can do, and new VMs. api.rst names these "system ioctls"."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from types import TracebackType

from hostel.abi import kvm as abi
from hostel.errors import KvmError

from .ioctl import call, errno_of
from .lists import cpuid_entries, empty_cpuid, empty_msr_list, get_msrs, msr_indices
from .vm import Vm

DEVICE = "/dev/kvm"
_COST = "engine kvm cannot be used"


class System:
    """An open ``/dev/kvm``. A context manager; VMs made from it live on after ``close``."""

    def __init__(self, path: str = DEVICE) -> None:
        self.fd = _open(path)
        try:
            self._require_api_version()
        except KvmError:
            self.close()
            raise

    def api_version(self) -> int:
        """KVM_GET_API_VERSION, api.rst §4.1: 12, for ever."""
        return call(self.fd, "KVM_GET_API_VERSION", abi.GET_API_VERSION)

    def check(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION, api.rst §4.4: 0 for no, else 1 or a number with a meaning."""
        return call(self.fd, "KVM_CHECK_EXTENSION", abi.CHECK_EXTENSION, capability)

    def max_vcpus(self) -> int:
        """KVM_CAP_MAX_VCPUS, or the recommended number where KVM does not say (api.rst §4.7)."""
        return self.check(abi.CAP_MAX_VCPUS) or self.check(abi.CAP_NR_VCPUS) or 4

    def supported_cpuid(self) -> list[abi.CpuidEntry2]:
        """KVM_GET_SUPPORTED_CPUID, api.rst §4.46: what this host and this KVM can show a guest."""
        buffer = self._grow(
            "KVM_GET_SUPPORTED_CPUID", abi.GET_SUPPORTED_CPUID, empty_cpuid, first=128
        )
        return cpuid_entries(buffer)

    def has_tsc_deadline(self) -> bool:
        """KVM_CAP_TSC_DEADLINE_TIMER: KVM_GET_SUPPORTED_CPUID does not tell (api.rst §4.46)."""
        return bool(self.check(abi.CAP_TSC_DEADLINE_TIMER))

    def msr_indices(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST, api.rst §4.3: the MSRs that make up a vCPU's state."""
        return msr_indices(
            self._grow("KVM_GET_MSR_INDEX_LIST", abi.GET_MSR_INDEX_LIST, empty_msr_list, first=256)
        )

    def feature_msr_indices(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST, api.rst §4.3: MSRs that describe features, like CPUID."""
        return msr_indices(
            self._grow(
                "KVM_GET_MSR_FEATURE_INDEX_LIST",
                abi.GET_MSR_FEATURE_INDEX_LIST,
                empty_msr_list,
                first=128,
            )
        )

    def feature_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS on the system, api.rst §4.18: the host's values of feature MSRs."""
        return get_msrs(self.fd, indices)

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM, api.rst §4.2."""
        try:
            fd = call(self.fd, "KVM_CREATE_VM", abi.CREATE_VM)
        except KvmError as error:
            error.cure = "another hypervisor (VirtualBox, VMware) may hold the CPU's virtualization"
            raise
        size = call(self.fd, "KVM_GET_VCPU_MMAP_SIZE", abi.GET_VCPU_MMAP_SIZE)
        return Vm(fd, size)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> System:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_api_version(self) -> None:
        version = self.api_version()
        if version != abi.API_VERSION:
            raise KvmError(
                f"{DEVICE} speaks API version {version}, not {abi.API_VERSION}", cost=_COST
            )

    def _grow(
        self, name: str, request: int, make: Callable[[int], bytearray], first: int
    ) -> bytearray:
        """Ask for a list whose length only the kernel knows; it answers E2BIG to a short buffer."""
        length = first
        while True:
            buffer = make(length)
            try:
                call(self.fd, name, request, buffer)
            except KvmError as error:
                if errno_of(error) != errno.E2BIG or length >= 1 << 16:
                    raise
                length *= 2
            else:
                return buffer


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KvmError(_why_not(path, error), cost=_COST, cure=_cure(error)) from None


def _why_not(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no {path}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} may not be opened by this user"
    return f"{path} does not open: {error.strerror}"


def _cure(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return 'add yourself to group kvm (sudo usermod -aG kvm "$USER") and log in again'
    return (
        "load it (sudo modprobe kvm_intel or kvm_amd), and enable virtualization in the firmware, "
        "or nested virtualization in the host above"
    )
