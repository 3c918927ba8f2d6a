# SPDX-License-Identifier: Apache-2.0
"""Wall and CPU time of a command with all that it leaves behind, and the memory of a process tree."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import time

PR_SET_CHILD_SUBREAPER = 36
CGROUPS = "/sys/fs/cgroup"


class Failed(Exception):
    """A command that did not do what was asked; the text is shown in the table."""


@dataclasses.dataclass
class Sample:
    started_ns: int
    wall_ns: int
    user_ns: int
    system_ns: int
    # How long processes lived on after the command had returned.
    after_ns: int

    @property
    def cpu_ns(self):
        return self.user_ns + self.system_ns


def become_subreaper():
    """So that what a runtime leaves behind becomes our child, and its CPU time known."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER)")


@contextlib.contextmanager
def deadline(seconds, what):
    def expired(_number, _frame):
        raise Failed("%s: not finished after %d s" % (what, seconds))
    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def spawn(command, messages, environment=None):
    """`messages` gets stdout and stderr. Not subprocess: its own work would be in every sample."""
    nothing = (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
    output = (os.POSIX_SPAWN_OPEN, 1, messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    errors = (os.POSIX_SPAWN_DUP2, 1, 2)
    return os.posix_spawn(command[0], command, environment or os.environ,
                          file_actions=[nothing, output, errors])


def last_line(messages):
    try:
        with open(messages, errors="replace") as file:
            lines = [line.strip() for line in file if line.strip()]
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def run(command, messages, environment=None, seconds=60):
    """A Sample of the command, which has to end with status 0."""
    name = os.path.basename(command[0])
    started = time.monotonic_ns()
    pid = spawn(command, messages, environment)
    try:
        with deadline(seconds, name):
            _, status, usage = os.wait4(pid, 0)
            wall = time.monotonic_ns() - started
            usages = [usage] + reap_all()
        after = time.monotonic_ns() - started - wall
    except Failed:
        kill_descendants()
        raise
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        raise Failed("%s: status %d: %s" % (name, code, last_line(messages)))
    return Sample(started, wall, sum(int(u.ru_utime * 1e9) for u in usages),
                  sum(int(u.ru_stime * 1e9) for u in usages), after)


def reap_all():
    usages = []
    while True:
        try:
            usages.append(os.wait4(-1, 0)[2])
        except ChildProcessError:
            return usages


def descendants():
    """Process ids below this process, which as a subreaper has all that its commands left."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open("/proc/%s/stat" % entry) as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry)] = int(fields[1])
    found, level = [], {os.getpid()}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found += sorted(level)
    return found


def kill_descendants():
    for pid in descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(Failed), deadline(20, "killed processes"):
        reap_all()


def process_memory(pid):
    sizes = {}
    with open("/proc/%d/smaps_rollup" % pid) as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss", "Anonymous"):
                sizes[name] = int(rest.split()[0]) * 1024
    with open("/proc/%d/comm" % pid) as file:
        name = file.read().strip()
    return {"name": name, "rss": sizes.get("Rss", 0), "pss": sizes.get("Pss", 0), "anonymous": sizes.get("Anonymous", 0)}


def cgroup_of(pid):
    with open("/proc/%s/cgroup" % pid) as file:
        for line in file:
            if line.startswith("0::"):
                return line[3:].strip()
    return None


def cgroup_memory(pids):
    """memory.current of the cgroups that these processes do not share with us, or None."""
    ours = cgroup_of("self")
    groups = {cgroup_of(pid) for pid in pids} - {None, ours, "/"}
    try:
        total = 0
        for group in groups:
            with open(CGROUPS + group + "/memory.current") as file:
                total += int(file.read())
    except OSError:
        return None
    return total if groups else None


def tree_memory():
    """Memory of all our descendants now."""
    processes, pids = [], descendants()
    for pid in pids:
        # A kernel thread or one that ends just now has no smaps.
        with contextlib.suppress(OSError):
            processes.append(process_memory(pid))
    if not processes:
        raise Failed("no process is left to measure")
    return {"pss": sum(p["pss"] for p in processes), "cgroup": cgroup_memory(pids), "processes": processes}
