# SPDX-License-Identifier: Apache-2.0
"""The state of the machine, and the tables."""

import os
import platform
import statistics
import subprocess
import time

import counts


def read(path, default=""):
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return default


def cpuinfo(field):
    for line in read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def kind_of_machine():
    """"emulated", "virtual" or "hardware"; only the last has times that are worth anything by themselves."""
    if os.environ.get("SANDBOX_EMULATED_HOST"):
        return "emulated"
    return "virtual" if "hypervisor" in cpuinfo("flags").split() else "hardware"


def commit(root):
    # Root in the emulated host looks at another user's clone.
    result = subprocess.run(["git", "-c", "safe.directory=*", "-C", root, "describe", "--always", "--dirty"],
                            capture_output=True, text=True)
    return result.stdout.strip()


def machine(root):
    return {
        "kind": kind_of_machine(),
        "kernel": platform.release(),
        "cpu": cpuinfo("model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cgroup_v2": os.path.exists("/sys/fs/cgroup/cgroup.controllers"),
        "kvm": os.path.exists("/dev/kvm"),
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "none"),
        "load_before": os.getloadavg(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(root),
    }


KINDS = {
    "emulated": "Ran in the emulated host of tests/host: the times are the emulator's, not hardware's. "
                "Only ratios within this table mean something.",
    "virtual": "Ran in a virtual machine.",
    "hardware": "Ran on hardware.",
}


def median(values):
    return statistics.median(values) if values else None


def percentile(values, fraction):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def milliseconds(ns):
    return "%.1f" % (ns / 1e6)


def mebibytes(size):
    return "-" if size is None else "%.1f" % (size / (1 << 20))


def table(rows, left=1):
    """Aligned columns, the first `left` to the left."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i < left or len(row) == left + 1 else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines[:1])))
    return "\n".join(lines)


def header(results):
    m = results["machine"]
    load = "%.2f before, %.2f after" % (m["load_before"][0], m["load_after"][0])
    return "\n".join((
        KINDS[m["kind"]],
        "%s, %d CPUs, Linux %s, load %s, commit %s" % (m["cpu"], m["cpus"], m["kernel"], load, m["commit"]),
    ))


def plain_rows(heading, results, key, cells):
    """One row a runtime: its figures, or the reason why there are none."""
    rows = [heading]
    for runtime in results["runtimes"]:
        reason = runtime["reason"] or runtime[key + "_reason"]
        rows.append([runtime["label"]] + (cells(runtime) if runtime[key] else ["not measured: %s" % reason]))
    # A reason is as long as it likes; it must not widen the column of figures.
    figures = table([row for row in rows if len(row) > 2] or [heading])
    reasons = ["%s: %s" % (row[0], row[1]) for row in rows if len(row) == 2]
    return "\n".join([figures] + reasons)


def start_table(results):
    base = next((r for r in results["runtimes"] if r["name"] == "runc" and r["start"]), None)

    def ratio(runtime, of):
        if not base:
            return "-"
        return "%.2f" % (median(map(of, runtime["start"])) / median(map(of, base["start"])))

    def wall(sample):
        return sample["wall_ns"]

    def cpu(sample):
        return sample["user_ns"] + sample["system_ns"]

    def cells(runtime):
        walls = [wall(s) for s in runtime["start"]]
        return [
            milliseconds(median(walls)), milliseconds(percentile(walls, 0.1)), milliseconds(percentile(walls, 0.9)),
            ratio(runtime, wall), milliseconds(median([cpu(s) for s in runtime["start"]])), ratio(runtime, cpu),
            str(len(walls)), str(len(runtime["failures"])),
        ]

    heading = ["start of /bin/true", "wall ms", "p10", "p90", "/ runc", "CPU ms", "/ runc", "runs", "failed"]
    return plain_rows(heading, results, "start", cells)


def idle_table(results):
    def cells(runtime):
        return [
            mebibytes(median([s["pss"] for s in runtime["idle"]])),
            mebibytes(median([s["cgroup"] for s in runtime["idle"] if s["cgroup"] is not None])),
            str(int(median([len(s["processes"]) for s in runtime["idle"]]))), str(len(runtime["idle"])),
        ] + many(runtime)

    def many(runtime):
        """What each of several takes, and how many there were."""
        found = runtime["many"]
        if not found:
            return ["-", "-"]
        return [mebibytes(found["pss"] / found["count"]), str(found["count"])]

    heading = ["idle container", "PSS MiB", "cgroup MiB", "processes", "runs", "each of several: PSS MiB", "of"]
    return plain_rows(heading, results, "idle", cells)


def verb_table(results):
    base = next((r for r in results["runtimes"] if r["name"] == "runc" and r["exec"]), None)

    def cells(runtime):
        row = []
        for verb in ("exec", "delete"):
            middle = median(runtime[verb])
            row += [milliseconds(middle), "%.2f" % (middle / median(base[verb])) if base else "-"]
        return row + [str(len(runtime["exec"])), str(len(runtime["delete"]))]

    measured = dict(results, runtimes=[r for r in results["runtimes"] if r["exec"] or r["exec_reason"]])
    heading = ["verbs", "exec ms", "/ runc", "delete -f ms", "/ runc", "execs", "deletes"]
    return plain_rows(heading, measured, "exec", cells)


def stage_tables(results):
    """Of the runtimes that tell their stages; each figure is the time since the stage before."""
    tables = []
    for runtime in results["runtimes"]:
        durations, order = {}, []
        for sample in runtime["start"]:
            last = sample["started_ns"]
            for stage, at in sample["stages"]:
                if stage not in durations:
                    order.append(stage)
                durations.setdefault(stage, []).append(at - last)
                last = at
            if sample["stages"]:
                durations.setdefault("return", []).append(sample["started_ns"] + sample["wall_ns"] - last)
        if order:
            rows = [["stages of " + runtime["label"], "ms", "p90", "runs"]]
            rows += [[stage, milliseconds(median(durations[stage])), milliseconds(percentile(durations[stage], 0.9)),
                      str(len(durations[stage]))] for stage in order + ["return"]]
            tables.append(table(rows))
    return tables


def network_table(results):
    base = next((r for r in results["runtimes"] if r["name"] == "runc" and r["network"]), None)

    def figure(runtime, key):
        return median([sample[key] for sample in runtime["network"]])

    def ratio(runtime, key):
        return "%.2f" % (figure(runtime, key) / figure(base, key)) if base else "-"

    def cells(runtime):
        row = []
        for direction in ("into", "out"):
            row += ["%.2f" % (figure(runtime, direction) / 1e9), ratio(runtime, direction),
                    "%.1f" % figure(runtime, direction + "_cpu"), ratio(runtime, direction + "_cpu")]
        return row + ["%.0f" % figure(runtime, "connections"), ratio(runtime, "connections"),
                      str(len(runtime["network"]))]

    heading = ["network", "in Gbit/s", "/ runc", "CPU s/GiB", "/ runc", "out Gbit/s", "/ runc", "CPU s/GiB", "/ runc",
               "connections/s", "/ runc", "runs"]
    measured = dict(results, runtimes=[r for r in results["runtimes"] if r["network"] or r["network_reason"]])
    return plain_rows(heading, measured, "network", cells)


def render(results):
    parts = [header(results)]
    if results["rounds"]:
        parts.append(start_table(results))
    if any(runtime["idle"] or runtime["idle_reason"] for runtime in results["runtimes"]):
        parts.append(idle_table(results))
    if any(runtime["network"] for runtime in results["runtimes"]):
        parts.append(network_table(results))
    if any(runtime["exec"] for runtime in results["runtimes"]):
        parts.append(verb_table(results))
    parts += stage_tables(results)
    found = results["counts"]
    parts.append(table(counts.rows(found)) if "counts" in found else "counts: not measured: %s" % found["reason"])
    return "\n\n".join(parts)
