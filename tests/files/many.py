# SPDX-License-Identifier: Apache-2.0
"""Makes, renames, reads and removes many small files, and prints how long each took."""

import os
import sys
import time

COUNT = int(sys.argv[1])
PER_DIRECTORY = 250

os.chdir("/mnt")
start = time.monotonic()


def lap(what):
    global start
    now = time.monotonic()
    print("%s: %d files in %.1f s" % (what, COUNT, now - start), file=sys.stderr, flush=True)
    start = now


def name(prefix, number):
    return "%s%d/%d" % (prefix, number // PER_DIRECTORY, number)


for number in range(COUNT):
    if number % PER_DIRECTORY == 0:
        os.mkdir("a%d" % (number // PER_DIRECTORY))
        os.mkdir("b%d" % (number // PER_DIRECTORY))
    fd = os.open(name("a", number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    os.write(fd, b"%d" % number)
    os.close(fd)
lap("made")
for number in range(COUNT):
    os.rename(name("a", number), name("b", number))
lap("renamed")
for number in range(0, COUNT, 16):
    with open(name("b", number), "rb", buffering=0) as file:
        assert file.read() == b"%d" % number, number
start = time.monotonic()
found = 0
for directory in range(COUNT // PER_DIRECTORY):
    assert not os.listdir("a%d" % directory)
    names = os.listdir("b%d" % directory)
    assert sorted(map(int, names)) == list(range(directory * PER_DIRECTORY, (directory + 1) * PER_DIRECTORY))
    found += len(names)
assert found == COUNT
lap("listed")
# One of sixteen stays for the host to look at.
for number in range(COUNT):
    if number % 16:
        os.unlink(name("b", number))
lap("removed")
