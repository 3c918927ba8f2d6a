# SPDX-License-Identifier: Apache-2.0
"""Makes, renames, reads and removes many small files, several at a time, and prints how long each took."""

import os
import sys
import time

COUNT = int(sys.argv[1])
PER_DIRECTORY = 250
WORKERS = 8

os.chdir("/mnt")


def numbers(directory, step=1):
    return range(directory * PER_DIRECTORY, (directory + 1) * PER_DIRECTORY, step)


def everywhere(what, act):
    """Calls `act` for each directory, in several processes."""
    start = time.monotonic()
    workers = []
    for worker in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for directory in range(worker, COUNT // PER_DIRECTORY, WORKERS):
                    act(directory)
                status = 0
            finally:
                os._exit(status)
        workers.append(pid)
    for pid in workers:
        assert os.waitpid(pid, 0)[1] == 0, what
    print("%s: %d files in %.1f s" % (what, COUNT, time.monotonic() - start), file=sys.stderr, flush=True)


def make(directory):
    os.mkdir("a%d" % directory)
    os.mkdir("b%d" % directory)
    for number in numbers(directory):
        fd = os.open("a%d/%d" % (directory, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, b"%d" % number)
        os.close(fd)


def rename(directory):
    for number in numbers(directory):
        os.rename("a%d/%d" % (directory, number), "b%d/%d" % (directory, number))


def read(directory):
    for number in numbers(directory, 16):
        with open("b%d/%d" % (directory, number), "rb", buffering=0) as file:
            assert file.read() == b"%d" % number, number


def list_all(directory):
    assert not os.listdir("a%d" % directory)
    names = os.listdir("b%d" % directory)
    assert sorted(map(int, names)) == list(numbers(directory))


def remove(directory):
    """One of sixteen stays for the host to look at."""
    kept = set(numbers(directory, 16))
    for number in numbers(directory):
        if number not in kept:
            os.unlink("b%d/%d" % (directory, number))


everywhere("made", make)
everywhere("renamed", rename)
everywhere("read one of sixteen", read)
everywhere("listed", list_all)
everywhere("removed", remove)
