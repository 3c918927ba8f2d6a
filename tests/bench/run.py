#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Measures how long OCI runtimes take to start /bin/true and what an idle container weighs, in turn, on this host.

See tests/bench/README.md.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile

sys.dont_write_bytecode = True

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [HERE, os.path.join(ROOT, "examples")]

import bundle  # noqa: E402
import counts  # noqa: E402
import measure  # noqa: E402
import network  # noqa: E402
import report  # noqa: E402
import runtimes  # noqa: E402

WARM_UPS = 2
# In each running container that exec is measured in.
EXECS = 3


def parse_arguments():
    target = os.path.join(ROOT, "target")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="starts of each runtime (30)")
    parser.add_argument("--idle-rounds", type=int, default=3, metavar="N", help="idle containers of each (3)")
    parser.add_argument("--many", type=int, default=10, metavar="N", help="idle containers of each at once (10)")
    parser.add_argument("--verb-rounds", type=int, default=5, metavar="N",
                        help="running containers of each, for exec (three times) and delete (5)")
    parser.add_argument("--network-rounds", type=int, default=3, metavar="N", help="network measurements of each (3)")
    parser.add_argument("--network-seconds", type=int, default=4, metavar="N", help="each of their three parts (4)")
    parser.add_argument("--only", metavar="NAME,...", help="of sandbox, sandbox-cold, runc, crun, runsc, qemu")
    parser.add_argument("--results", metavar="FILE", default=os.path.join(target, "bench/results.json"),
                        help="raw samples (target/bench/results.json)")
    parser.add_argument("--rootfs", metavar="DIR", default=os.path.join(target, "rootfs"))
    parser.add_argument("--sandbox", metavar="FILE", default=os.path.join(target, "release/sandbox"))
    parser.add_argument("--guest-files", metavar="DIR", default=os.path.join(target, "lib/sandbox"),
                        help="kernel and initramfs for QEMU")
    parser.add_argument("--qemu-memory", type=int, default=256, metavar="MIB", help="of QEMU's guest (256)")
    arguments = parser.parse_args()
    counts_given = (arguments.rounds, arguments.idle_rounds, arguments.many, arguments.verb_rounds,
                    arguments.network_rounds)
    if min(counts_given) < 0 or arguments.network_seconds < 1:
        parser.error("rounds must be at least 0, --network-seconds at least 1")
    if not os.path.exists(os.path.join(arguments.rootfs, "bin/true")):
        parser.error("%s: no root file system with /bin/true; examples/rootfs.sh makes it" % arguments.rootfs)
    if os.geteuid() != 0:
        parser.error("root is needed: the runtimes are measured as engines start them")
    return arguments


def chosen(arguments, directory):
    all_of_them = [
        runtimes.OciRuntime("sandbox", arguments.sandbox, directory),
        runtimes.OciRuntime("sandbox-cold", arguments.sandbox, directory, run_options=("--no-template",)),
        runtimes.OciRuntime("runc", "runc", directory),
        runtimes.OciRuntime("crun", "crun", directory),
        # Its network set-up takes every namespace for the host's on newer kernels; an empty one is none.
        runtimes.OciRuntime("runsc", "runsc", directory, ("--network=none",)),
        runtimes.Qemu(arguments.guest_files, arguments.qemu_memory, directory),
    ]
    names = arguments.only.split(",") if arguments.only else [runtime.name for runtime in all_of_them]
    unknown = set(names) - {runtime.name for runtime in all_of_them}
    if unknown:
        sys.exit("bench: --only: unknown %s" % ", ".join(sorted(unknown)))
    return [runtime for runtime in all_of_them if runtime.name in names]


def make_bundle(directory, name, arguments, rootfs):
    config = bundle.template()
    config["process"]["args"] = arguments
    config["root"] = {"path": os.path.realpath(rootfs), "readonly": True}
    path = os.path.join(directory, name)
    os.mkdir(path)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(config, file)
    return path, config


def progress(text):
    print("bench: " + text, file=sys.stderr, flush=True)


def warm_up(runtime, record, path):
    """Fills the caches and finds out whether the runtime works here at all."""
    record["reason"] = runtime.missing()
    for attempt in range(WARM_UPS):
        if record["reason"]:
            break
        try:
            runtime.start(path, "warm-%s-%d" % (runtime.name, attempt))
        except (measure.Failed, OSError) as error:
            record["reason"] = str(error)
    progress("%s: %s" % (runtime.label, record["reason"] or "works"))


def one_start(runtime, record, path, number, position):
    try:
        sample, stages = runtime.start(path, "bench-%s-%d" % (runtime.name, number))
    except (measure.Failed, OSError) as error:
        record["failures"].append({"round": number, "reason": str(error)})
        record["start_reason"] = str(error)
        progress("round %d: %s" % (number + 1, error))
        return
    record["start"].append(dict(dataclasses.asdict(sample), round=number, position=position, stages=stages))


def starts(pairs, path, rounds):
    """In each round all of them in turn, each round beginning with another one."""
    for number in range(rounds):
        first = number % max(1, len(pairs))
        for position, (runtime, record) in enumerate(pairs[first:] + pairs[:first]):
            one_start(runtime, record, path, number, position)
        if (number + 1) % 10 == 0:
            progress("%d of %d rounds" % (number + 1, rounds))


def idles(pairs, path, rounds):
    for number in range(rounds):
        for runtime, record in pairs:
            try:
                record["idle"].append(runtime.idle(path, "idle-%s-%d" % (runtime.name, number)))
            except (measure.Failed, OSError) as error:
                record["idle_reason"] = str(error)
                progress("idle: %s" % error)


def many_idles(pairs, path, count):
    for runtime, record in pairs:
        try:
            record["many"] = dict(runtime.idle(path, "many-" + runtime.name, count), count=count)
        except (measure.Failed, OSError) as error:
            progress("%d idle: %s" % (count, error))


def verbs(pairs, path, rounds):
    for number in range(rounds):
        for runtime, record in pairs:
            try:
                times = runtime.verbs(path, "verbs-%s-%d" % (runtime.name, number), EXECS)
                record["exec"] += times["exec"]
                record["delete"] += times["delete"]
            except (measure.Failed, OSError) as error:
                record["exec_reason"] = str(error)
                progress("exec and delete: %s" % error)


def counted(pairs, true_bundle, idle_bundle):
    runtime = next((runtime for runtime, _ in pairs if runtime.name == "sandbox"), None)
    reason = counts.missing() if runtime else "sandbox is not measured"
    try:
        return {"reason": reason} if reason else counts.measure_counts(runtime, true_bundle, idle_bundle)
    except (measure.Failed, OSError) as error:
        return {"reason": str(error)}


def write_results(path, results):
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = "%s.%d" % (path, os.getpid())
    with open(temporary, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    os.rename(temporary, path)
    return path


def measure_all(arguments, directory):
    true_bundle, config = make_bundle(directory, "true", ["/bin/true"], arguments.rootfs)
    idle_bundle, _ = make_bundle(directory, "idle", ["sleep", "3600"], arguments.rootfs)
    results = {"machine": report.machine(ROOT), "rounds": arguments.rounds, "config": config,
               "qemu_memory_mib": arguments.qemu_memory, "runtimes": []}
    pairs = []
    for runtime in chosen(arguments, directory):
        record = {"name": runtime.name, "label": runtime.label, "version": runtime.version, "reason": None,
                  "start": [], "start_reason": None, "failures": [], "idle": [], "idle_reason": None,
                  "exec": [], "delete": [], "exec_reason": None,
                  "many": None, "network": [], "network_reason": None}
        results["runtimes"].append(record)
        warm_up(runtime, record, true_bundle)
        if not record["reason"]:
            pairs.append((runtime, record))
    starts(pairs, true_bundle, arguments.rounds)
    idles(pairs, idle_bundle, arguments.idle_rounds)
    containers = [pair for pair in pairs if pair[0].name != "qemu"]
    if arguments.many:
        many_idles(containers, idle_bundle, arguments.many)
    # A booted one is as a restored one by then.
    verbs([pair for pair in containers if pair[0].name != "sandbox-cold"], idle_bundle, arguments.verb_rounds)
    results["counts"] = counted(pairs, true_bundle, idle_bundle)
    # The others have no network here, or none by this set-up.
    networked = [(runtime, record) for runtime, record in pairs if runtime.name in ("sandbox", "runc", "crun")]
    network.measure_network(networked, directory, config, arguments.network_rounds, arguments.network_seconds)
    results["machine"]["load_after"] = os.getloadavg()
    return results


def main():
    arguments = parse_arguments()
    measure.become_subreaper()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = tempfile.mkdtemp(prefix="sandbox-bench.")
    try:
        results = measure_all(arguments, directory)
    finally:
        measure.kill_descendants()
        shutil.rmtree(directory, ignore_errors=True)
    path = write_results(arguments.results, results)
    print(report.render(results))
    print("\nraw samples: %s" % path)


if __name__ == "__main__":
    main()
