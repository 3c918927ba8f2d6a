# SPDX-License-Identifier: Apache-2.0
# What a program in a container can see of itself. Put in front of the tests' own lines, which end with a show().

import json, os, sys


def read(path):
    """What a file holds, or why it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip("\n\0")
    except OSError as error:
        return error.strerror


def tried(action, *arguments):
    """What comes of an action: "ok" or why not."""
    try:
        action(*arguments)
        return "ok"
    except OSError as error:
        return error.strerror


def written(path, text):
    def write():
        with open(path, "w") as file:
            file.write(text)
    return tried(write)


def status(name):
    """A line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return lines[name].strip()


def capabilities():
    sets = {}
    for name in ("Bnd", "Eff", "Inh", "Prm", "Amb"):
        bits = int(status("Cap" + name), 16)
        sets[name] = [number for number in range(64) if bits >> number & 1]
    return sets


def mounts():
    """By their place; of several at one place the last."""
    found = {}
    for line in open("/proc/self/mountinfo"):
        fields = line.split()
        end = fields.index("-")
        found[fields[4]] = {
            "root": fields[3],
            "options": fields[5].split(","),
            "propagation": [field.split(":")[0] for field in fields[6:end]],
            "type": fields[end + 1],
            "source": fields[end + 2],
            "data": fields[end + 3].split(","),
        }
    return found


def node(path):
    """Kind, number, mode and owner of a file."""
    import stat
    found = os.lstat(path)
    return [
        stat.filemode(found.st_mode),
        [os.major(found.st_rdev), os.minor(found.st_rdev)],
        [found.st_uid, found.st_gid],
    ]


def system_call(number, *arguments):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    return result if result >= 0 else os.strerror(ctypes.get_errno())


def show(**values):
    print(json.dumps(values), flush=True)
