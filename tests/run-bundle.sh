#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs a bundle with `sandbox run`, on this machine if its KVM runs guests, else in the emulated host.
# Without an argument the example bundle `hello` is made and run.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)

if [ $# -gt 0 ]; then
    bundle=$(realpath "$1")
else
    bundle=$top/target/bundles/hello
    "$top/examples/bundle.sh" hello "$bundle"
fi
"$top/tests/host/packages.sh" host
exec "$top/tests/host/run" -- "$top/target/release/sandbox" run "$bundle"
