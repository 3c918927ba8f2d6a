#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Picks the test programs out of cargo's JSON messages: all of them, or those named."""

import json
import sys

wanted = set(sys.argv[1:])
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") != "compiler-artifact" or not message.get("executable"):
        continue
    target = message["target"]
    if "test" in target["kind"] and (not wanted or target["name"] in wanted):
        print(message["executable"])
