#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Packs the agent into an initramfs: an uncompressed newc cpio, the same bytes for the same agent.
set -euo pipefail

[ $# = 2 ] || { echo "usage: guest-kernel/initramfs.sh AGENT_BINARY OUT.cpio" >&2; exit 2; }
[ -f "$1" ] || { echo "initramfs.sh: $1: no such file" >&2; exit 1; }
mkdir -p "$(dirname "$2")"

exec python3 - "$1" "$2" <<'PYTHON'
import os, stat, sys

agent, out = sys.argv[1:]


def align(size):
    return b"\0" * (-size % 4)


# Documentation/driver-api/early-userspace/buffer-format.rst, "cpio headers": thirteen fields of eight hexadecimal digits.
def record(inode, name, mode, device=(0, 0), data=b""):
    name = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return header + name + align(len(header) + len(name)) + data + align(len(data))


with open(agent, "rb") as file:
    init = file.read()
entries = [(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "run", "sys")]
# The kernel opens /dev/console for PID 1 before anything is mounted.
entries.append(("dev/console", stat.S_IFCHR | 0o600, (5, 1)))
# There is none, so the agent starts without standard streams and Rust's start-up code opens this in their place.
entries.append(("dev/null", stat.S_IFCHR | 0o666, (1, 3)))
entries.append(("init", stat.S_IFREG | 0o755, (0, 0), init))

scratch = f"{out}.{os.getpid()}"
try:
    with open(scratch, "wb") as file:
        for inode, entry in enumerate(entries, start=1):
            file.write(record(inode, *entry))
        file.write(record(0, "TRAILER!!!", 0))
    os.rename(scratch, out)
except BaseException:
    if os.path.exists(scratch):
        os.unlink(scratch)
    raise
PYTHON
