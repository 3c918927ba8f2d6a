# SPDX-License-Identifier: Apache-2.0
"""Eats memory in steps of 10 MB and never has enough."""

STEP = 10 * 1000 * 1000

eaten = []
while len(eaten) < 1000:
    eaten.append(b"x" * STEP)
    print("%4d MB" % (len(eaten) * STEP // 1000000), flush=True)
