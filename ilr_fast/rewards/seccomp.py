"""A seccomp filter: the system calls that a program under test has no use for fail with EPERM.

No sockets (so no network where there is no network namespace), no tracing or reading of other processes, no mounts or
namespaces, no memory outside the address-space limit (memfd, System V), no kernel interfaces of poor record (bpf,
io_uring, userfaultfd, keys, performance events). clone3 fails with ENOSYS, upon which libc falls back to clone, whose
flags can be seen. Numbers: the kernel's tables of system calls, x86_64 and arm64.
"""

from __future__ import annotations

import ctypes
import errno
import struct

from ilr_fast.rewards.syscalls import MACHINE, PR_SET_SECCOMP, prctl

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
NEW_NAMESPACES = 0x7E020000  # CLONE_NEW* of clone's flags
# io_uring, the new mount interface, pidfd_getfd, memfd_secret
COMMON = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
DENIED = {
    "x86_64": (
        41, 42, 49, 50,  # socket, connect, bind, listen
        101, 310, 311, 312,  # ptrace, process_vm_readv, process_vm_writev, kcmp
        155, 161, 165, 166, 272, 308, 303, 304,  # pivot_root, chroot, mount, umount2, unshare, setns, file handles
        29, 30, 64, 68, 240, 319,  # shmget, shmat, semget, msgget, mq_open, memfd_create
        248, 249, 250, 298, 321, 323,  # keys, perf_event_open, bpf, userfaultfd
        175, 176, 313, 246, 320, 163, 164, 167, 168, 169, 170, 171, 172, 173, 179, 227,  # modules, kexec, time
        135, 253, 294, 300, 278,  # personality, inotify, fanotify, vmsplice
    ),
    "aarch64": (
        198, 203, 200, 201,
        117, 270, 271, 272,
        41, 51, 40, 39, 97, 268, 264, 265,
        194, 196, 190, 186, 180, 279,
        217, 218, 219, 241, 280, 282,
        105, 106, 273, 104, 294, 89, 170, 224, 225, 142, 161, 162, 60, 112,
        92, 26, 262, 75,
    ),
}  # fmt: skip
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def available() -> bool:
    """Whether this machine's system call numbers are known."""
    return MACHINE in DENIED


def install() -> None:
    """Installs the filter for this process and all it will start. Needs no_new_privs. Raises OSError."""
    instructions = program(MACHINE)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    prctl(PR_SET_SECCOMP, 2, ctypes.pointer(Filter(len(instructions), ctypes.addressof(code))))


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter as classic BPF: (operation, jump if true, jump if false, operand)."""
    denied = (RETURN, 0, 0, ERRNO | errno.EPERM)
    out = [
        (LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCHITECTURES[machine]), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, 0x40000000), denied,  # the x32 table
        (EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | errno.ENOSYS),
    ]  # fmt: skip
    for number in (*DENIED[machine], *COMMON):
        out += [(EQUAL, 0, 1, number), denied]
    out += [(EQUAL, 0, 3, CLONE[machine]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES), denied]
    return [*out, (RETURN, 0, 0, ALLOW)]
