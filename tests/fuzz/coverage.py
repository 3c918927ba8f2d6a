# SPDX-License-Identifier: Apache-2.0
"""Reads lcov on stdin and prints the line coverage of each file that parses bytes of others, and of each device. Lines
of tests do not count."""

import os
import re
import sys

WANTED = ["vmm/src/devices/", "vmm/src/snapshot.rs", "agent/protocol/src/", "runtime-shim/src/bundle.rs",
          "runtime-shim/src/plan/", "runtime-shim/src/agent_client.rs"]
TESTS = re.compile(r"/tests?\.rs|/tests/|_tests\.rs|/test_support\.rs|/fuzzing\.rs")


def end_of_code(path):
    """The line at which the tests of a file begin."""
    lines = open(path).read().split("\n")
    for number, line in enumerate(lines, 1):
        if line == "#[cfg(test)]" and lines[number:number + 3] and any(
                following.startswith("mod tests {") for following in lines[number:number + 3]):
            return number
    return len(lines) + 1


def main():
    top = os.getcwd() + "/"
    files, lines, end = {}, None, 0
    for line in sys.stdin:
        key, _, value = line.strip().partition(":")
        if key == "SF":
            name = os.path.normpath(value).removeprefix(top)
            wanted = any(name.startswith(prefix) for prefix in WANTED) and not TESTS.search(name)
            lines = files.setdefault(name, {}) if wanted else None
            end = end_of_code(value) if wanted else 0
        elif key == "DA" and lines is not None:
            number, count = (int(part) for part in value.split(",")[:2])
            if number < end:
                lines[number] = lines.get(number, 0) + count
    modules = {}
    for name, lines in sorted(files.items()):
        module = re.sub(r"(virtio/(?:fs|vsock|net|block)|plan|protocol/src)/.*", r"\1/", name)
        for group in {module, name}:
            covered, total = modules.get(group, (0, 0))
            modules[group] = covered + sum(1 for count in lines.values() if count), total + len(lines)
    for name, (covered, total) in sorted(modules.items()):
        if total:
            print(f"{100 * covered / total:5.1f} %  {covered:5} of {total:5} lines  {name}")


main()
