#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes docs/oci-fields.md from what the tests say about themselves, or checks that it is up to date (--check).

A test of a field has a line `/// FATE: FIELD FIELD…` above it; tests/conformance/fields.txt lists the fields there
are. A field without a test, or a test of no field, is an error.
"""

import collections
import os
import re
import sys

TESTS = os.path.dirname(os.path.realpath(__file__))
TABLE = os.path.join(TESTS, "..", "docs", "oci-fields.md")
FATES = {
    "guest": "guest",
    "host": "host",
    "refused": "refused",
    "ignored": "ignored with a warning",
}

HEAD = """<!-- SPDX-License-Identifier: Apache-2.0 -->
<!-- Made by tests/fields.py from the tests. -->
# Fields of config.json

What becomes of each field of the OCI runtime specification 1.3, and the test that looks: from inside the container, at
the host, or at the error.

- **guest**: applied inside the virtual machine, by its own kernel.
- **host**: applied to the monitor, which is the container as far as the host is concerned.
- **refused**: `create` fails with one line that names the field; where the field has another fate too, only values that
  nothing can be made of are refused.
- **ignored with a warning**: engines send it whether or not it means anything; the warning goes to the log.

Nothing is dropped without a word.

| field | fate | tests |
|---|---|---|
"""


def listed():
    with open(os.path.join(TESTS, "conformance", "fields.txt")) as file:
        lines = [line.strip() for line in file]
    return [line for line in lines if line and not line.startswith("#")]


def covered():
    """Of each field, its fates with the tests that show them."""
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for name in sorted(os.listdir(TESTS)):
        if not name.endswith(".rs"):
            continue
        with open(os.path.join(TESTS, name)) as file:
            lines = file.read().splitlines()
        claims = []
        for line in lines:
            claim = re.match(r"/// (%s): (.*)" % "|".join(FATES), line)
            function = re.match(r"fn (\w+)\(", line)
            if claim:
                # What a field is tried for may follow in parentheses.
                claims.append((claim[1], re.sub(r"\(.*?\)", "", claim[2]).split()))
            elif function:
                for fate, fields in claims:
                    for field in fields:
                        test = "%s::%s" % (name[:-3], function[1])
                        if test not in found[field][fate]:
                            found[field][fate].append(test)
                claims = []
    return found


def table(fields, found):
    rows = []
    for field in fields:
        fates = [fate for fate in FATES if fate in found[field]]
        tests = []
        for fate in fates:
            tests += ["`%s`" % test for test in found[field][fate] if "`%s`" % test not in tests]
        rows.append("| `%s` | %s | %s |\n" % (field, ", ".join(FATES[fate] for fate in fates), "<br>".join(tests)))
    return HEAD + "".join(rows)


def main():
    fields, found = listed(), covered()
    faults = ["%s: no test" % field for field in fields if field not in found]
    faults += ["%s: not in fields.txt" % field for field in found if field not in fields]
    if faults:
        sys.exit("fields: " + "\nfields: ".join(faults))
    text = table(fields, found)
    if sys.argv[1:] == ["--check"]:
        with open(TABLE) as file:
            if file.read() != text:
                sys.exit("fields: docs/oci-fields.md is not up to date: run tests/fields.py")
    else:
        os.makedirs(os.path.dirname(TABLE), exist_ok=True)
        with open(TABLE, "w") as file:
            file.write(text)


main()
