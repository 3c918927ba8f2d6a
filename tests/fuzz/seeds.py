# SPDX-License-Identifier: Apache-2.0
"""Writes the first inputs of each target: seeds.py DIRECTORY. Device targets read programs, one byte a step; see
vmm/src/fuzzing/driver.rs for the steps."""

import json
import os
import struct
import sys

TOP = os.path.dirname(os.path.abspath(__file__)) + "/../.."
START = bytes([3, 0x7f, 0xff])  # all features but EVENT_IDX, all queues
START_EVENT_IDX = bytes([3, 0xff, 0xff])
KICKS = bytes([6, 0, 6, 1, 6, 2, 7])
EXTRA = 15  # the steps of one device alone


def chain(queue, buffers):
    """A chain of buffers at offsets in the space for them: (offset, length, flags)."""
    data = bytes([4, queue, len(buffers) - 1])
    for offset, length, flags in buffers:
        data += bytes([2]) + struct.pack("<H", offset) + bytes([1]) + struct.pack("<H", length) + bytes([flags])
    return data


def packet(op, port=1, payload=0, flags=0, odd=0):
    body = bytes([EXTRA, 7, odd | (8 if payload else 0), 5, port])
    return body + (struct.pack("<H", payload) if payload else b"") + bytes([op, flags])


def fuse(opcode, node=0, body=b""):
    return bytes([opcode, node]) + body + bytes([7])


def frame(*parts):
    body = b"".join(parts)
    return struct.pack("<I", len(body)) + body


def text(value):
    return bytes([len(value)]) + value.encode()


def seeds():
    chains = chain(0, [(0, 64, 2)]) + chain(1, [(0, 44, 0), (64, 64, 2)]) + chain(2, [(0, 4096, 2)])
    program = START + chains + KICKS + bytes([10]) + chains + KICKS + bytes([8])
    event_idx = START_EVENT_IDX + chains + KICKS + bytes([10]) + KICKS
    for device in range(4):
        yield "registers", bytes([device]) + program
        yield "registers", bytes([device]) + event_idx
        yield "snapshot", bytes([2, 0, device]) + program
    table = struct.pack("<QIHH", 0x3000, 64, 1, 1) + struct.pack("<QIHH", 0x3000, 64, 2, 0)
    indirect = struct.pack("<QIHH", 0x3000, 32, 4, 0)
    ring = struct.pack("<HHH", 0, 1, 0).ljust(36, b"\0")
    inner = struct.pack("<QIHH", 0x8000, 16, 1, 1) + struct.pack("<QIHH", 0x8100, 16, 2, 0)
    use = b"".join(struct.pack("<HB", 10, step) for step in (2, 0, 4, 5, 3, 1))
    yield "descriptor-chains", table.ljust(256, b"\0") + ring + inner.ljust(256, b"\0") + use
    yield "descriptor-chains", indirect.ljust(256, b"\0") + ring + inner.ljust(256, b"\0") + use
    yield "rng", START + bytes([EXTRA]) + struct.pack("<H", 64) + bytes([1]) + chains + KICKS
    yield "rng", START_EVENT_IDX + (bytes([EXTRA]) + struct.pack("<H", 0xffff) + bytes([1])) * 6 + KICKS
    pfns = bytes([8]) + bytes([1, 0x30, 1, 0x31, 1, 0x32, 1, 0x90] * 2)
    yield "balloon", START + bytes([EXTRA, 0]) + struct.pack("<I", 9) + bytes([EXTRA, 2]) + pfns + bytes([EXTRA, 3]) + pfns
    yield "balloon", START_EVENT_IDX + bytes([EXTRA, 1]) + struct.pack("<HH", 0, 0x8000) + KICKS + bytes([10]) + KICKS
    for stream in range(3):
        accept = bytes([EXTRA, 0, 1, stream])
        room = bytes([EXTRA, 4, 3]) + struct.pack("<HHHH", 4096, 4096, 100, 1)
        data = bytes([EXTRA, 1, 0, 0]) + struct.pack("<H", 3000)
        read = bytes([EXTRA, 1, 1, 1]) + struct.pack("<H", 3000)
        talk = START + accept + room + packet(1) + data + bytes([7]) + packet(5, payload=1000) + read + packet(6)
        yield "vsock", talk + packet(7) + room + packet(4, flags=3) + bytes([7, EXTRA, 3])
        yield "vsock", talk + bytes([EXTRA, 1, 0, 2, 7]) + room + packet(4, flags=1) + packet(3) + bytes([EXTRA, 2, 1])
        yield "vsock", talk + bytes([10, 7]) + packet(5, payload=60000) * 3 + read + bytes([7, 8])
    init = bytes([EXTRA, 1, 0, 26]) + bytes([200, 0])
    yield "fs-device", START + init + KICKS + chains + KICKS
    everything = b"".join(fuse(opcode, opcode % 5, bytes([0, 0, 0, 0, 0])) for opcode in range(1, 52))
    yield "fs-requests", everything
    yield "fs-requests", everything[::-1]
    yield "uart", bytes([3, 1, 0x80, 0, 1, 0x41, 3, 1, 3] + [0, 1, 0x42, 0, 1, 0x1b] * 8 + [5, 0])
    select = bytes([1, 3, 1])
    yield "ioapic", b"".join(select + bytes([reg, 0, 0, 0, 2, 3, 1, 0x31, 0, value, 0]) for reg in range(0x10, 0x28)
                             for value in (0, 1)) + bytes([2, 3, 0])
    ready = frame(bytes([1, 0, 1]))
    exited = frame(bytes([1, 1]), text("fuzz"), bytes([0, 3]))
    out_of_memory = frame(bytes([1, 2]), text("fuzz"))
    done = frame(bytes([0, 1, 0, 0]))
    created = frame(bytes([0, 2, 0, 1, 77]))
    usage = frame(bytes([0, 3, 0, 2, 1]), text("cpu.stat"), text("usage_usec 1"), text("eth0"))
    processes = frame(bytes([0, 1, 0, 3, 2, 5, 6]))
    error = frame(bytes([0, 1, 1, 2]), text("no \x1b[2J\nsuch"))
    for piece in (1, 255):
        yield "agent-frames", bytes([piece]) + ready + exited + out_of_memory + done + created + usage
        yield "agent-frames", bytes([piece]) + ready + processes + error
    yield "monitor-frames", b"\xff" + frame(bytes([1, 0, 2, 5, 3, 1, 2, 3]))
    for request in range(2, 16):
        yield "monitor-frames", b"\xff" + frame(bytes([1, request]), text("fuzz"), bytes(12))
    with open(TOP + "/examples/config.json") as file:
        config = json.load(file)
    for variant in configs(config):
        yield "config", json.dumps(variant).encode()
    process = dict(config["process"], terminal=True, consoleSize={"width": 80, "height": 25})
    yield "process", json.dumps(process).encode()


def configs(config):
    config["root"] = {"path": "rootfs"}
    yield config
    yield dict(config, process=dict(
        config["process"], terminal=True, consoleSize={"width": 80, "height": 25}, oomScoreAdj=100,
        user={"uid": 1, "gid": 2, "umask": 18, "additionalGids": [3, 4]}, noNewPrivileges=True, apparmorProfile="x",
        rlimits=[{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}], selinuxLabel="y",
        scheduler={"policy": "SCHED_BATCH", "nice": 5}, ioPriority={"class": "IOPRIO_CLASS_IDLE", "priority": 4},
        execCPUAffinity={"initial": "0-1", "final": "1"}))
    yield dict(config, annotations={"io.sandbox.vm.vcpus": "2", "io.sandbox.vm.memory": "512", "a": "b"},
               hooks={kind: [{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}] for kind in
                      ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")},
               hostname="h", domainname="d", vm={"hypervisor": {"path": "/x"}, "kernel": {"path": "/y"}})
    mounts = [("/proc", "proc", "proc", ["nosuid"]), ("/tmp", "tmpfs", "tmpfs", ["size=64k", "mode=1777", "tmpcopyup"]),
              ("/sys/fs/cgroup", "cgroup", "cgroup", ["ro"]), ("/dev/mqueue", "mqueue", "mqueue", []),
              ("/a", "bind", "/etc", ["rbind", "ro", "rprivate"]), ("/ab", "bind", "rel", ["bind", "idmap"]),
              ("/abc", "none", "/x", ["bind", "rw", "uid=1"]), ("../x", "overlay", "o", ["lowerdir=/a"])]
    yield dict(config, mounts=[dict(zip(("destination", "type", "source", "options"), mount)) for mount in mounts])
    yield dict(config, linux={
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "user", "cgroup", "time")] +
                      [{"type": "network", "path": "/var/run/netns/x"}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}}, "sysctl": {"net.ipv4.ip_forward": "1"},
        "devices": [{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0}],
        "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "mountLabel": "z", "rootfsPropagation": "shared",
        "cgroupsPath": "system.slice:sandbox:fuzz", "personality": {"domain": "LINUX32"},
        "intelRdt": {"closID": "x"}})
    yield dict(config, linux={"cgroupsPath": "/a/../b", "resources": {
        "devices": [{"allow": False, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
        "memory": {"limit": 1 << 28, "reservation": 1 << 27, "swap": 1 << 29, "swappiness": 60, "kernel": -1,
                   "disableOOMKiller": False, "useHierarchy": True},
        "cpu": {"shares": 512, "quota": 150000, "period": 100000, "burst": 1000, "cpus": "0-3,5", "mems": "0", "idle": 1},
        "pids": {"limit": 100}, "hugepageLimits": [{"pageSize": "2MB", "limit": 1 << 21}],
        "blockIO": {"weight": 100, "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1000}]},
        "network": {"classID": 1, "priorities": [{"name": "eth0", "priority": 1}]},
        "rdma": {"mlx5": {"hcaHandles": 3}}, "unified": {"memory.high": "1000000", "../x": "y"}}})
    yield dict(config, linux={"seccomp": {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/x", "syscalls": [
            {"names": ["read", "clone", "nosuch"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 2114060288, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}})


def main():
    numbers = {}
    for target, data in seeds():
        number = numbers[target] = numbers.get(target, 0) + 1
        os.makedirs(f"{sys.argv[1]}/{target}", exist_ok=True)
        with open(f"{sys.argv[1]}/{target}/seed-{number}", "wb") as file:
            file.write(data)


main()
