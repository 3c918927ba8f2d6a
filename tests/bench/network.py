# SPDX-License-Identifier: Apache-2.0
"""Throughput by iperf3 and the rate of connections between host and container, over a veth pair made by hand."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time

import measure

NAMESPACE = "bench-network"
LINK = "bench-veth"
HOST, CONTAINER = "10.98.0.1", "10.98.0.2"
RATE_PORT = 5202

# One byte each way for each connection.
SERVER = """
import socket
server = socket.create_server(("", %d), backlog=128)
while True:
    connection, _ = server.accept()
    connection.sendall(connection.recv(1))
    connection.close()
""" % RATE_PORT


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)


@contextlib.contextmanager
def link():
    """A namespace with eth0, whose other end has an address here."""
    try:
        ip("netns", "add", NAMESPACE)
        ip("link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NAMESPACE)
        ip("addr", "add", HOST + "/24", "dev", LINK)
        ip("link", "set", LINK, "up")
        ip("-n", NAMESPACE, "addr", "add", CONTAINER + "/24", "dev", "eth0")
        ip("-n", NAMESPACE, "link", "set", "eth0", "up")
        yield "/var/run/netns/" + NAMESPACE
    finally:
        for words in (("link", "del", LINK), ("netns", "del", NAMESPACE)):
            subprocess.run(["ip", *words], capture_output=True, timeout=60)


def make_bundle(directory, config, namespace):
    """This host's own programs, so that both ends are the same."""
    path = os.path.join(directory, "network")
    root = os.path.join(path, "rootfs")
    for name in ("usr", "proc", "sys", "dev", "tmp", "etc"):
        os.makedirs(os.path.join(root, name))
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink("usr/" + name, os.path.join(root, name))
    config = json.loads(json.dumps(config))
    config["process"]["args"] = ["sh", "-c", "iperf3 -s >/dev/null & exec python3 -c '%s'" % SERVER]
    config["root"] = {"path": root, "readonly": True}
    config["mounts"].append({"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]})
    config["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
    for entry in config["linux"]["namespaces"]:
        if entry["type"] == "network":
            entry["path"] = namespace
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump(config, file)
    return path


def busy_seconds():
    """CPU time that this machine has spent on anything, guests included."""
    with open("/proc/stat") as file:
        fields = [int(field) for field in file.readline().split()[1:]]
    user, nice, system, _idle, _wait, interrupts, soft = fields[:7]
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def wait_for(port):
    end = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((CONTAINER, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise measure.Failed("network: port %d: %s" % (port, error))
            time.sleep(0.05)


def iperf(seconds, *options):
    """Bits a second, and CPU seconds for each GiB."""
    before = busy_seconds()
    done = subprocess.run(["iperf3", "-c", CONTAINER, "-t", str(seconds), "-J", *options],
                          capture_output=True, text=True, timeout=seconds + 60)
    cpu = busy_seconds() - before
    result = json.loads(done.stdout)
    if done.returncode or "error" in result:
        raise measure.Failed("iperf3: %s" % result.get("error", done.stderr))
    received = result["end"]["sum_received"]
    return received["bits_per_second"], cpu / (received["bytes"] / 2**30)


def connections(seconds):
    """Connections a second, one after the other."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.create_connection((CONTAINER, RATE_PORT), timeout=10) as connection:
            connection.sendall(b"x")
            if connection.recv(1) != b"x":
                raise measure.Failed("network: a connection ended early")
        count += 1
    return count / seconds


def one(runtime, bundle, container, seconds):
    pid = measure.spawn(runtime.command("run", "--detach", "--bundle", bundle, container), runtime.messages)
    try:
        with measure.deadline(60, runtime.name + " run --detach"):
            _, status = os.waitpid(pid, 0)
        if status != 0:
            raise measure.Failed("%s: %s" % (runtime.name, measure.last_line(runtime.messages)))
        wait_for(5201)
        wait_for(RATE_PORT)
        into, into_cpu = iperf(seconds)
        out, out_cpu = iperf(seconds, "-R")
        return {"into": into, "into_cpu": into_cpu, "out": out, "out_cpu": out_cpu,
                "connections": connections(seconds)}
    finally:
        runtime.remove(container)


def missing():
    return next(("%s not found" % name for name in ("iperf3", "ip") if not shutil.which(name)), None)


def measure_network(pairs, directory, config, rounds, seconds):
    """Each runtime in turn; fills `network` or `network_reason` of their records."""
    reason = missing()
    if reason or not rounds:
        for _, record in pairs:
            record["network_reason"] = reason or "not asked for"
        return
    with link() as namespace:
        bundle = make_bundle(directory, config, namespace)
        for number in range(rounds):
            for runtime, record in pairs:
                try:
                    container = "network-%s-%d" % (runtime.name, number)
                    record["network"].append(one(runtime, bundle, container, seconds))
                except (measure.Failed, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
                    record["network_reason"] = str(error)
