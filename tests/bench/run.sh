#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Measures runtimes on a host with working KVM (run.py; options go there), after setting up what that takes.
# The raw samples come back in target/bench/results.json.
set -euo pipefail
top=$(cd "$(dirname "$0")/../.." && pwd)
results=$top/target/bench

"$top/tests/host/packages.sh" host runtimes
"$top/examples/rootfs.sh"
mkdir -p "$results"
command=("$top/tests/bench/run.py" --results "$results/results.json" "$@")
if [ "$(id -u)" != 0 ] && "$top/tests/host/kvm-works" 2>/dev/null; then
    echo "bench: not root: using sudo, so that all runtimes run as engines start them" >&2
    exec sudo "${command[@]}"
fi
exec "$top/tests/host/run" --results "$results" -- "${command[@]}"
