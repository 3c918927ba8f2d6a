#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the config.json of an example: the template config.json beside this file and a few changes."""

import json
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))

# Where a container finds the programs of examples/programs.
PROGRAMS = "/example"

# As container engines grant them to root.
ENGINE_CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
    "CAP_SYS_CHROOT",
]

# System calls that lead from a container to the kernel's or the host's other parts.
FORBIDDEN_CALLS = [
    "bpf", "delete_module", "finit_module", "init_module", "kexec_file_load", "kexec_load",
    "open_by_handle_at", "perf_event_open",
]


def capabilities(config, names):
    for kind in config["process"]["capabilities"]:
        config["process"]["capabilities"][kind] = names


def bind(config, source, destination):
    config["mounts"].append({
        "destination": destination, "type": "bind", "source": source,
        "options": ["rbind", "ro", "nosuid", "nodev"],
    })


def hello(config):
    config["process"]["args"] = ["python3", PROGRAMS + "/hello.py"]
    config["root"]["readonly"] = False


def memory(config):
    config["process"]["args"] = ["sh", PROGRAMS + "/memory.sh"]
    # The second is memory and swap together.
    config["linux"]["resources"]["memory"] = {"limit": 100 << 20, "swap": 100 << 20}


def readonly(config):
    config["process"]["args"] = ["sh", PROGRAMS + "/readonly.sh"]
    bind(config, "shared", "/mnt")


def processes(config):
    config["process"]["args"] = ["sh", PROGRAMS + "/processes.sh"]


def port80(config):
    config["process"]["args"] = ["python3", PROGRAMS + "/port80.py"]
    capabilities(config, ["CAP_AUDIT_WRITE", "CAP_KILL"])


def escape(config):
    config["process"]["args"] = ["python3", PROGRAMS + "/escape.py"]
    capabilities(config, ENGINE_CAPABILITIES + ["CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE"])
    config["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": FORBIDDEN_CALLS, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    }


def shell(config):
    config["process"]["args"] = ["bash", "-l"]
    config["process"]["terminal"] = True
    config["process"]["cwd"] = "/root"
    config["root"]["readonly"] = False
    capabilities(config, ENGINE_CAPABILITIES)


EXAMPLES = {function.__name__: function
            for function in (hello, memory, readonly, processes, port80, escape, shell)}


def template():
    with open(os.path.join(HERE, "config.json"), encoding="utf-8") as file:
        return json.load(file)


def configuration(name, rootfs):
    """`rootfs` is that of the read-only examples; the others have a copy in their bundle."""
    config = template()
    config["hostname"] = name
    EXAMPLES[name](config)
    if config["root"]["readonly"]:
        config["root"]["path"] = rootfs
        bind(config, "programs", PROGRAMS)
    return config


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in EXAMPLES:
        sys.exit("usage: bundle.py %s ROOTFS" % "|".join(EXAMPLES))
    json.dump(configuration(sys.argv[1], sys.argv[2]), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
