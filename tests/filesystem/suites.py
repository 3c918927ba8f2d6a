# SPDX-License-Identifier: Apache-2.0
"""suites.py SUITE [RUNTIME...]: run by run.sh on a host with KVM. Makes an ext4 file system in memory, a bundle on it,
and runs the suite in it by each runtime, in the container's root file system and in a directory bound into it."""

import json
import os
import shutil
import subprocess
import sys
import time

TOP = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
TOOLS = os.path.join(TOP, "target/filesystem-tests")
RUNTIMES = {"sandbox": os.path.join(TOP, "target/release/sandbox"), "runc": "/usr/sbin/runc"}
IMAGE = "/tmp/filesystem.ext4"
DISK = "/tmp/filesystem"
SHORTER = ("FSX_SEEDS", "FSX_OPERATIONS", "PJDFSTEST")
FILES = ("suite.sh", "fsx.toml", "pjdfstest.toml", "fio.ini")
CAPABILITIES = ["CAP_" + name for name in (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL LINUX_IMMUTABLE MKNOD SETGID SETUID SETPCAP SYS_ADMIN "
    "SYS_CHROOT").split()]


def make_disk():
    with open(IMAGE, "w") as file:
        file.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b4096", IMAGE], check=True)
    os.mkdir(DISK)
    subprocess.run(["mount", "-o", "loop", IMAGE, DISK], check=True)


def make_rootfs(path):
    """The tools with their libraries, and a busybox."""
    shutil.copytree(TOOLS, path)
    for name in FILES:
        shutil.copy(os.path.join(TOP, "tests/filesystem", name), os.path.join(path, "bin"))
    for name in ("sh", "tail", "grep", "awk", "which", "mount", "umount"):
        os.symlink("busybox", os.path.join(path, "bin", name))
    for name in ("etc", "proc", "sys", "dev", "tmp", "volume", "work"):
        os.makedirs(os.path.join(path, name))
    for name, lines in {
        "passwd": ["root:x:0:0::/:/bin/sh", "daemon:x:1:1::/:/bin/sh", "nobody:x:65534:65534::/:/bin/sh"],
        "group": ["root:x:0:", "daemon:x:1:", "nogroup:x:65534:"],
    }.items():
        with open(os.path.join(path, "etc", name), "w") as file:
            file.write("".join(line + "\n" for line in lines))


def config(args, volume):
    environment = ["PATH=/bin", "LC_ALL=C"]
    environment += ["%s=%s" % (name, os.environ[name]) for name in SHORTER if name in os.environ]
    sets = ("bounding", "effective", "permitted", "inheritable", "ambient")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/", "env": environment,
            "capabilities": {name: CAPABILITIES for name in sets},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 4096}],
        },
        "root": {"path": "rootfs", "readonly": False},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
            {"destination": "/volume", "type": "bind", "source": volume, "options": ["bind"]},
        ],
        "linux": {"namespaces": [{"type": name} for name in ("pid", "network", "ipc", "uts", "mount")]},
    }


def run_on_host(suite, rootfs):
    work = os.path.join(DISK, "host")
    os.mkdir(work)
    environment = dict(os.environ, PATH=os.path.join(rootfs, "bin") + ":" + os.environ["PATH"])
    return subprocess.run(["/bin/busybox", "sh", os.path.join(rootfs, "bin/suite.sh"), suite, work, "/dev/shm"],
                          env=environment).returncode


def run_in_container(suite, runtime, directory, volume):
    with open(os.path.join(DISK, "bundle/config.json"), "w") as file:
        json.dump(config(["/bin/sh", "/bin/suite.sh", suite, directory, "/dev/shm"], volume), file)
    command = [RUNTIMES[runtime], "run", "-b", os.path.join(DISK, "bundle"), "suite-%d" % time.monotonic_ns()]
    return subprocess.run(command, stdin=subprocess.DEVNULL).returncode


def main():
    suite, runtimes = sys.argv[1], sys.argv[2:] or ["sandbox", "runc"]
    make_disk()
    rootfs = os.path.join(DISK, "bundle/rootfs")
    os.mkdir(os.path.dirname(rootfs))
    make_rootfs(rootfs)
    failed = []
    for runtime in runtimes:
        places = ["the host"] if runtime == "host" else ["/work", "/volume"]
        for place in places:
            print("== %s, %s, %s" % (suite, runtime, place), flush=True)
            start = time.monotonic()
            volume = os.path.join(DISK, "volume-" + runtime)
            os.makedirs(volume, exist_ok=True)
            if runtime == "host":
                status = run_on_host(suite, rootfs)
            else:
                status = run_in_container(suite, runtime, place, volume)
            print("   status %d after %.0f s" % (status, time.monotonic() - start), flush=True)
            if status:
                failed.append("%s in %s" % (runtime, place))
            shutil.rmtree(os.path.join(rootfs, "work"))
            os.mkdir(os.path.join(rootfs, "work"))
    if failed:
        sys.exit("%s failed: %s" % (suite, ", ".join(failed)))


if __name__ == "__main__":
    main()
