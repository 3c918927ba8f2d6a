# SPDX-License-Identifier: Apache-2.0
"""Root, with more capabilities than any engine grants, tries to leave the container."""

import ctypes
import os
import stat
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
HERE = os.path.realpath(__file__)
SYS_OPEN_BY_HANDLE_AT = 304
SYS_INIT_MODULE = 175

# Numbers of disks as Linux hosts have them: SCSI, virtio, NVMe, loop.
DISKS = {"sda": (8, 0), "vda": (254, 0), "vdb": (252, 0), "nvme0n1": (259, 0), "loop0": (7, 0)}


class Outside(Exception):
    pass


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source, target, kind, flags=0):
    check(LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, None))


def must_be_here(root):
    """`root` is this container's own root if this very program lies in it."""
    if not os.path.exists(os.path.join(root, HERE.lstrip("/"))):
        raise Outside("%s shows %s" % (root, sorted(os.listdir(root))))


def chroot_and_climb():
    """Open /, chroot below it, climb from the open directory"""
    top = os.open("/", os.O_RDONLY)
    os.mkdir("/tmp/cage")
    os.chroot("/tmp/cage")
    os.fchdir(top)
    for _ in range(100):
        os.chdir("..")
    os.chroot(".")
    must_be_here("/")
    return "the way up ends at the container's own root"


def root_of_process_1():
    """Look at the root of process 1"""
    must_be_here("/proc/1/root/")
    return "process 1 is the container's own"


def disks_by_number():
    """Make device files of the host's disks and read them"""
    reasons = set()
    for name, (major, minor) in DISKS.items():
        path = "/dev/stolen-" + name
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
            with open(path, "rb") as disk:
                raise Outside("%s gives %d bytes" % (name, len(disk.read(512))))
        except OSError as error:
            reasons.add(error.strerror)
    return "none opens: " + ", ".join(sorted(reasons))


def mount_disks():
    """Mount every disk that the kernel names"""
    with open("/proc/partitions") as file:
        names = [line.split() for line in file.read().splitlines()[2:]]
    os.mkdir("/tmp/disk")
    for major, minor, _, name in names:
        path = "/dev/mount-" + name
        for kind in ("ext4", "xfs", "btrfs", "vfat"):
            try:
                if not os.path.exists(path):
                    os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(int(major), int(minor)))
                mount(path, "/tmp/disk", kind, 1)
                raise Outside("%s is mounted: %s" % (name, os.listdir("/tmp/disk")))
            except OSError:
                pass
    return "this kernel names %d disks, none can be mounted" % len(names)


def other_processes():
    """Find a process with another root"""
    ours = {entry for entry in os.listdir("/proc") if entry.isdigit()}
    for pid in sorted(ours, key=int):
        try:
            must_be_here("/proc/%s/root/" % pid)
        except FileNotFoundError:
            pass
    return "of %d visible processes all are in this container" % len(ours)


def open_by_handle():
    """Open files of the host by their inode numbers"""
    handle = (ctypes.c_uint32 * 4)(8, 1, 2, 0)
    result = LIBC.syscall(SYS_OPEN_BY_HANDLE_AT, os.open("/", os.O_RDONLY), handle, os.O_RDONLY)
    if result >= 0:
        os.fchdir(result)
        must_be_here(".")
    check(result)
    return "only the container's own files"


def load_module():
    """Load a module into the kernel"""
    check(LIBC.syscall(SYS_INIT_MODULE, b"\x7fELF", 4, b""))
    raise Outside("the kernel took it")


def write_sysrq():
    """Tell the kernel to synchronise its disks"""
    with open("/proc/sysrq-trigger", "w") as file:
        file.write("s")
    raise Outside("the kernel did it")


ATTEMPTS = (chroot_and_climb, root_of_process_1, disks_by_number, mount_disks, other_processes,
            open_by_handle, load_module, write_sysrq)


def attempt(function):
    """In a process of its own, as some attempts change that. True if still inside."""
    print("%-59s " % (function.__doc__ + ":"), end="", flush=True)
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    status = 0
    try:
        print(function())
    except OSError as error:
        print("refused (%s)" % error.strerror)
    except Outside as outside:
        print("OUTSIDE: %s" % outside)
        status = 1
    sys.stdout.flush()
    os._exit(status)


inside = sum([attempt(function) for function in ATTEMPTS])
print("still inside after %d of %d attempts" % (inside, len(ATTEMPTS)))
sys.exit(0 if inside == len(ATTEMPTS) else 1)
