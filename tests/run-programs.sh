#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs test programs one after the other and fails at the end if one of them failed.
set -uo pipefail

failed=()
for program in "$@"; do
    name=$(basename "$program")
    echo "     Running tests/${name%-*}.rs"
    "$program" --test-threads="${TEST_THREADS:-2}" || failed+=("${name%-*}")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "tests: failed: ${failed[*]}" >&2
    exit 1
fi
