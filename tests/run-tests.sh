#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Sets up and runs all tests: formatting and lints, unit and device tests here, then the integration tests with real
# guests where KVM works. `tests/run-tests.sh NAME...` runs only the named integration test targets (tests/NAME.rs).
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "tests: $*" >&2; }

tests/build.sh
tests/host/packages.sh host runtimes engines rootfs
examples/rootfs.sh target/rootfs
tests/filesystem/tools.sh
tests/hostile/build.sh target/hostile/kernel

if [ $# -eq 0 ]; then
    say "formatting and lints"
    cargo fmt --all --check
    cargo clippy --quiet --workspace --all-targets -- -D warnings
    say "dependencies"
    python3 tests/dependencies.py
    say "table of fields"
    tests/fields.py --check
    say "unit and device tests"
    cargo test --quiet --workspace --exclude tests --exclude agent
    cargo test --quiet -p agent --bins
    say "a short run of the fuzzer"
    tests/fuzz/run.sh 3
fi

say "building the integration tests"
# The agent's tests make containers on a kernel with a pure cgroup v2 tree, as the guest's is.
programs=$(cargo test --quiet -p tests -p agent --tests --no-run --message-format=json |
    python3 tests/test_programs.py "$@")
[ -n "$programs" ] || { say "no integration test is named: $*"; exit 1; }

say "integration tests with real guests"
failed=()
for program in $programs; do
    name=$(basename "$program")
    name=${name%-*}
    echo "     Running integration test $name"
    status=0
    run=(tests/host/run --timeout 900 -- "$program" "--test-threads=${TEST_THREADS:-1}")
    "${run[@]}" </dev/null || status=$?
    if [ "$status" = 125 ]; then
        # Not a test that failed: the emulated machine itself went down, which its emulator does now and then.
        say "the emulated host died while running $name; once more"
        status=0
        "${run[@]}" </dev/null || status=$?
    fi
    [ "$status" = 0 ] || failed+=("$name")
done
if [ ${#failed[@]} -gt 0 ]; then
    say "failed: ${failed[*]}"
    exit 1
fi
