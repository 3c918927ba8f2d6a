# SPDX-License-Identifier: Apache-2.0
"""Writes a file of many megabytes, no two of them equal, reads it back, and prints its hash."""

import hashlib
import os
import sys
import time

MEGABYTE = 1 << 20
SIZE = int(sys.argv[1])

block = bytearray(os.urandom(MEGABYTE))
start = time.monotonic()
written = hashlib.blake2b()
with open("/mnt/large", "xb", buffering=0) as file:
    for number in range(SIZE):
        block[:8] = number.to_bytes(8, "little")
        written.update(block)
        view = memoryview(block)
        while view:
            view = view[file.write(view):]
    os.fsync(file.fileno())
print("written in %.1f s" % (time.monotonic() - start), file=sys.stderr, flush=True)

start = time.monotonic()
read = hashlib.blake2b()
with open("/mnt/large", "rb", buffering=0) as file:
    # Otherwise much of it would come out of this kernel's cache.
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    while count := file.readinto(block):
        read.update(memoryview(block)[:count])
print("read in %.1f s" % (time.monotonic() - start), file=sys.stderr, flush=True)
assert read.digest() == written.digest()
print(read.hexdigest())
