#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks what the project is built from: every package comes from crates.io and is pinned by the lock file, its licence
is one of those below, no two versions of a package are linked together, and there are not more of them than
docs/dependencies.md promises. Prints their numbers.
"""

import collections
import json
import os
import re
import subprocess
import sys

TOP = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
DOCUMENT = os.path.join(TOP, "docs", "dependencies.md")

CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"

# Permissive, and compatible with Apache-2.0.
LICENCES = {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Zlib", "Unicode-3.0", "Unlicense", "0BSD",
            "Apache-2.0 WITH LLVM-exception"}

# Two versions that cannot be avoided, with who asks for the older one. Both only define types.
DUPLICATES = {"bitflags": "vmm-sys-util", "embedded-io": "postcard"}


def acceptable(expression):
    """Whether an SPDX expression can be fulfilled with LICENCES. `/` is the old way to write OR."""
    tokens = re.findall(r"\(|\)|[^\s()/]+(?: WITH [^\s()/]+)?|/", expression)

    def alternatives(position):
        result, position = conjunction(position)
        while position < len(tokens) and tokens[position] in ("OR", "/"):
            other, position = conjunction(position + 1)
            result = result or other
        return result, position

    def conjunction(position):
        result, position = term(position)
        while position < len(tokens) and tokens[position] == "AND":
            other, position = term(position + 1)
            result = result and other
        return result, position

    def term(position):
        if tokens[position] == "(":
            result, position = alternatives(position + 1)
            return result, position + 1
        return tokens[position] in LICENCES, position + 1

    return bool(tokens) and alternatives(0)[0]


def metadata():
    command = ["cargo", "metadata", "--format-version", "1", "--locked",
               "--filter-platform", "x86_64-unknown-linux-gnu"]
    return json.loads(subprocess.run(command, cwd=TOP, check=True, stdout=subprocess.PIPE).stdout)


def linked(graph, root):
    """The packages that end up in the programs of `root`: no build scripts, macros or tests."""
    nodes = {node["id"]: node for node in graph["resolve"]["nodes"]}
    macros = {package["id"] for package in graph["packages"]
              if any("proc-macro" in target["kind"] for target in package["targets"])}
    seen, rest = set(), [root]
    while rest:
        identity = rest.pop()
        if identity in seen or identity in macros:
            continue
        seen.add(identity)
        rest += [dependency["pkg"] for dependency in nodes[identity]["deps"]
                 if any(kind["kind"] is None for kind in dependency["dep_kinds"])]
    return seen


def main():
    graph = metadata()
    members = set(graph["workspace_members"])
    foreign = {package["id"]: package for package in graph["packages"] if package["id"] not in members}
    faults = []
    for package in foreign.values():
        name = "%s %s" % (package["name"], package["version"])
        if package["source"] != CRATES_IO:
            faults.append("%s: comes from %s" % (name, package["source"]))
        if not acceptable(package["license"] or ""):
            faults.append("%s: licence %s" % (name, package["license"] or "not stated"))
    counts = {"all": len(foreign)}
    duplicates = set()
    for package in graph["packages"]:
        if package["name"] not in ("runtime-shim", "agent") or package["id"] not in members:
            continue
        versions = collections.defaultdict(set)
        for identity in linked(graph, package["id"]) & foreign.keys():
            versions[foreign[identity]["name"]].add(foreign[identity]["version"])
        counts[package["name"]] = sum(map(len, versions.values()))
        for name, found in sorted(versions.items()):
            if len(found) == 1:
                continue
            duplicates.add(name)
            if name not in DUPLICATES:
                faults.append("%s: %s is linked in versions %s" % (package["name"], name, ", ".join(sorted(found))))
    for name in sorted(DUPLICATES.keys() - duplicates):
        faults.append("tests/dependencies.py: %s is not linked twice any more" % name)
    with open(DOCUMENT) as file:
        limits = dict(re.findall(r"^\| `?([\w-]+)`? \| (\d+) \|", file.read(), re.MULTILINE))
    for name, count in sorted(counts.items()):
        print("dependencies: %s: %d" % (name, count))
        if count > int(limits.get(name, 0)):
            faults.append("%s: %d crates, but docs/dependencies.md promises %s" % (name, count, limits.get(name)))
    for fault in faults:
        print("dependencies: %s" % fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
