# SPDX-License-Identifier: Apache-2.0
"""Reads what the host made, then makes files of each kind for the host to look at."""

import ctypes
import json
import os
import socket
import stat

os.chdir("/mnt")
os.umask(0o027)


def describe(path):
    info = os.lstat(path)
    names = [] if stat.S_ISLNK(info.st_mode) else sorted(os.listxattr(path))
    return {
        "mode": info.st_mode, "uid": info.st_uid, "gid": info.st_gid, "nlink": info.st_nlink, "size": info.st_size,
        "blocks": info.st_blocks, "atime": info.st_atime_ns, "mtime": info.st_mtime_ns,
        "target": os.readlink(path) if stat.S_ISLNK(info.st_mode) else None,
        "xattrs": {name: os.getxattr(path, name).hex() for name in names if name.startswith("user.")},
    }


def write(path, data=b""):
    with open(path, "xb") as file:
        file.write(data)


print(json.dumps({name: describe("host/" + name) for name in os.listdir("host")}))

write("masked", b"masked")
os.mkdir("masked-directory")

write("owned", b"12345")
os.chown("owned", 1234, 56789)
os.chmod("owned", 0o6751)
os.utime("owned", ns=(1_000_000_000_123_456_789, 1_500_000_000_987_654_321))
write("early")
os.utime("early", ns=(-1_500_000_000, -1))
write("late")
os.utime("late", ns=(4_102_444_800_000_000_001, 4_102_444_800_999_999_999))

os.mkdir("directory")
os.chown("directory", 0, 4242)
os.chmod("directory", 0o3770)
write("directory/inherits")

os.symlink("/no/such/\u00e9", "dangling")
os.chown("dangling", 77, 78, follow_symlinks=False)
os.utime("dangling", ns=(5, 1_234_567_890_000_000_007), follow_symlinks=False)
os.symlink("t" * 4000, "long-symlink")

write("linked", b"one")
os.link("linked", "directory/link")
os.link("dangling", "dangling-too", follow_symlinks=False)
with open("directory/link", "ab") as file:
    file.write(b" two")
assert os.path.samefile("linked", "directory/link") and os.stat("linked").st_nlink == 2
write("unlinked-once")
os.link("unlinked-once", "kept")
os.unlink("unlinked-once")

write("attributes")
os.setxattr("attributes", "user.binary", bytes(range(256)))
os.setxattr("attributes", "user.empty", b"")
os.setxattr("attributes", "user.gone", b"x")
os.removexattr("attributes", "user.gone")
os.setxattr("attributes", "user.replaced", b"old")
os.setxattr("attributes", "user.replaced", b"new", os.XATTR_REPLACE)
os.setxattr("directory", "user.directory", b"yes")
try:
    os.setxattr("attributes", "user.empty", b"", os.XATTR_CREATE)
    raise SystemExit("XATTR_CREATE replaced an attribute")
except FileExistsError:
    pass

MEGABYTE = 1 << 20
with open("holes", "xb") as file:
    file.seek(4 * MEGABYTE)
    file.write(b"x" * MEGABYTE)
    file.truncate(16 * MEGABYTE)
with open("holes", "rb") as file:
    fd = file.fileno()
    data = os.lseek(fd, 0, os.SEEK_DATA)
    assert (data, os.lseek(fd, data, os.SEEK_HOLE)) == (4 * MEGABYTE, 5 * MEGABYTE), data

libc = ctypes.CDLL(None, use_errno=True)
fallocate = libc.fallocate
fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
with open("punched", "xb") as file:
    file.write(b"x" * 4 * MEGABYTE)
    file.flush()
    result = fallocate(file.fileno(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, MEGABYTE, 2 * MEGABYTE)
    assert result == 0, os.strerror(ctypes.get_errno())
with open("allocated", "xb") as file:
    os.posix_fallocate(file.fileno(), 0, MEGABYTE)

os.mkfifo("fifo", 0o640)
with socket.socket(socket.AF_UNIX) as server:
    server.bind("socket")
