#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sets up and runs all tests: formatting and lints, unit and device tests here, then the integration tests with real
# guests where KVM works. `tests/run-tests.sh NAME...` runs only the named integration test targets (tests/NAME.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "tests: $*" >&2; }

tests/build.sh
tests/host/packages.sh host runtimes rootfs
examples/rootfs.sh target/rootfs

if [ $# -eq 0 ]; then
    say "formatting and lints"
    cargo fmt --all --check
    cargo clippy --quiet --workspace --all-targets -- -D warnings
    say "unit and device tests"
    cargo test --quiet --workspace --exclude tests --exclude agent
    cargo test --quiet -p agent --bins
fi

say "building the integration tests"
# The agent's tests make containers on a kernel with a pure cgroup v2 tree, as the guest's is.
programs=$(cargo test --quiet -p tests -p agent --test '*' --no-run --message-format=json |
    python3 tests/test_programs.py "$@")
[ -n "$programs" ] || { say "no integration test is named: $*"; exit 1; }

say "integration tests with real guests"
# One boot of the emulated host for all: what one test leaves behind, the leak tests are to see.
# shellcheck disable=SC2086 # one word a program
exec tests/host/run --timeout 2400 -- tests/run-programs.sh $programs
