# SPDX-License-Identifier: Apache-2.0
"""What a start costs in counts, which vary less than times: exits of the guest, requests to the file server, system
calls, pages of its own. `counts.py FILE` keeps those in a results file as what later ones are compared with."""

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys

KEPT = os.path.join(os.path.dirname(os.path.realpath(__file__)), "counts.json")
TRACING = "/sys/kernel/tracing"
STARTS = 5
# A count may be so much above the kept one. Timers and the order in which CPUs wake make for most of what varies.
TOLERANCE = 0.25

# arch/x86/include/uapi/asm/svm.h and vmx.h; the rest is "other exits".
REASONS = {
    "svm": {0x60: "interrupt", 0x64: "interrupt window", 0x72: "cpuid", 0x78: "halt", 0x7c: "MSR", 0x400: "page"},
    "vmx": {1: "interrupt", 7: "interrupt window", 10: "cpuid", 12: "halt", 32: "MSR", 48: "page", 49: "page"},
}
# The registers of the file system device, the first of all, and QUEUE_NOTIFY in it.
KICK = 0xd0000050


class Histogram:
    """Counts of an event by one of its fields, made by the kernel."""

    def __init__(self, event, key):
        self.directory = os.path.join(TRACING, "events", event)
        self.key = key

    def write(self, text):
        with open(os.path.join(self.directory, "trigger"), "w") as file:
            file.write(text)

    def __enter__(self):
        self.write("hist:keys=%s:size=4096" % self.key)
        return self

    def __exit__(self, *_):
        self.write("!hist:keys=%s:size=4096" % self.key)

    def read(self):
        with open(os.path.join(self.directory, "hist")) as file:
            found = re.findall(r"^\{ (.*) \} hitcount: +(\d+)", file.read(), re.MULTILINE)
        return [(key.partition(":")[2].strip(), int(count)) for key, count in found]


def missing():
    if not os.path.isdir(TRACING + "/events"):
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], stderr=subprocess.DEVNULL, check=False)
    if not os.path.exists(TRACING + "/events/kvm/kvm_exit/hist"):
        return "no histograms of trace events (CONFIG_HIST_TRIGGERS)"
    return None


def instruction_set():
    with open("/proc/cpuinfo") as file:
        return "svm" if re.search(r"^flags.*\bsvm\b", file.read(), re.MULTILINE) else "vmx"


def one_start(runtime, bundle, container):
    """Counts of one start of /bin/true to its end."""
    names = REASONS[instruction_set()]
    with contextlib.ExitStack() as stack:
        exits, mmio, calls = [stack.enter_context(Histogram(*which)) for which in (
            ("kvm/kvm_exit", "exit_reason"), ("kvm/kvm_mmio", "gpa.hex"), ("raw_syscalls/sys_enter", "common_pid.execname"))]
        runtime.start(bundle, container)
        found = {}
        for reason, count in exits.read():
            name = "exits: " + names.get(int(reason), "other")
            found[name] = found.get(name, 0) + count
            found["exits"] = found.get("exits", 0) + count
        found["file system requests"] = sum(count for address, count in mmio.read() if int(address, 16) == KICK)
        for process, count in calls.read():
            # The monitor is `exe` until it has named itself, its threads may still count as what they came from.
            if re.fullmatch(r"sandbox|exe|fs\d+|vcpu\d+", process.rpartition("[")[0].strip()):
                found["system calls"] = found.get("system calls", 0) + count
    return found


def pages(runtime, bundle, container):
    """Pages that an idle container has for itself, in all processes of the host."""
    processes = runtime.idle(bundle, container)["processes"]
    return sum(process["anonymous"] for process in processes) // os.sysconf("SC_PAGE_SIZE")


def measure_counts(runtime, true_bundle, idle_bundle):
    starts = [one_start(runtime, true_bundle, "counts-%d" % number) for number in range(STARTS)]
    names = sorted({name for start in starts for name in start})
    counts = {name: int(statistics.median(start.get(name, 0) for start in starts)) for name in names}
    counts["private pages when idle"] = pages(runtime, idle_bundle, "counts-idle")
    return {"instruction_set": instruction_set(), "counts": counts}


def kept():
    with open(KEPT) as file:
        return json.load(file)


def rows(found):
    """Each count, the kept one, and whether it has grown too much."""
    known = kept()
    comparable = known["instruction_set"] == found["instruction_set"]
    table = [["counts of a start", "now", "kept", ""]]
    for name, count in found["counts"].items():
        before = known["counts"].get(name) if comparable else None
        # Small ones vary by more than their share.
        grown = before is not None and count > before * (1 + TOLERANCE) + 20
        table.append([name, str(count), "-" if before is None else str(before), "GROWN" if grown else ""])
    return table


def main():
    with open(sys.argv[1]) as file:
        found = json.load(file)["counts"]
    if "counts" not in found:
        sys.exit("counts: %s has none: %s" % (sys.argv[1], found.get("reason")))
    with open(KEPT, "w") as file:
        json.dump(found, file, indent=1, sort_keys=True)
        file.write("\n")


if __name__ == "__main__":
    main()
