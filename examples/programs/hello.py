# SPDX-License-Identifier: Apache-2.0
"""Shows in which machine it runs."""

import os
import platform
import sys


def show(what, value, remark):
    print("%-9s %-31s %s" % (what, value, remark))


def first_line(path, start):
    with open(path) as file:
        for line in file:
            if line.startswith(start):
                return line[len(start):].strip(' :="\t\n')
    return "?"


# Writable also for a user who runs this without root, though all files are of the host's root.
WROTE = "/tmp/hello.txt"

show("system", first_line("/etc/os-release", "PRETTY_NAME"), "the root file system of the bundle")
show("kernel", os.uname().release, "not the host's: compare with `uname -r` there")
show("hostname", os.uname().nodename, "from config.json")
show("pid", os.getpid(), "the first process of its own process list")
show("user", "root" if os.geteuid() == 0 else os.geteuid(), "of the container, not of the host")
show("cpus", len(os.sched_getaffinity(0)), "of its machine")
show("memory", "%d MiB" % (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20), "of its machine")
show("python", platform.python_version(), "2**89 - 1 is prime: %s" % (pow(3, 2**89 - 2, 2**89 - 1) == 1))
try:
    with open(WROTE, "w") as file:
        print("written by pid", os.getpid(), "on", os.uname().release, file=file)
    show("wrote", WROTE, "on the host it is rootfs%s in the bundle" % WROTE)
except OSError as error:
    sys.exit("%s: %s" % (WROTE, error.strerror))
