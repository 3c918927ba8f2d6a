#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Fuzzes the parsers of guest and bundle bytes, guided by coverage (libFuzzer, with the compiler that builds the rest).
#
#   tests/fuzz/run.sh SECONDS [TARGET...]    fuzz each target for so long; default: all targets
#   tests/fuzz/run.sh coverage               line coverage of the devices by fuzzing and unit tests, from what is there
#
# Corpora grow in target/fuzz/corpus/TARGET; an input that fails is left in target/fuzz/TARGET-crash-*. To see one
# again: FUZZ_TARGET=TARGET target/fuzz/bin/fuzz FILE. FUZZ_DIR is used instead of target/fuzz. What is compiled stays in
# the cache of tests/host/packages.sh, so that a new checkout need not start from nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."

TARGETS=(registers descriptor-chains rng balloon vsock fs-device fs-requests uart ioapic snapshot
    agent-frames monitor-frames config process)
HOST=x86_64-unknown-linux-gnu
dir=${FUZZ_DIR:-$PWD/target/fuzz}
built=${SANDBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandbox-build}/fuzz
mkdir -p "$dir" "$built"

say() { echo "fuzz: $*" >&2; }

# build FLAGS TARGET_DIR
build() {
    RUSTFLAGS="--cfg fuzzing -A dead_code $1" cargo build --quiet --release --target "$HOST" \
        --manifest-path tests/fuzz/Cargo.toml --target-dir "$2"
}

fuzz() {
    local seconds=$1
    shift
    [ $# -gt 0 ] || set -- "${TARGETS[@]}"
    tests/host/packages.sh build
    say "building"
    # What cargo-fuzz asks for, but for sanitizers, which need another compiler.
    build "-C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
-C llvm-args=-sanitizer-coverage-inline-8bit-counters -C llvm-args=-sanitizer-coverage-pc-table \
-C llvm-args=-sanitizer-coverage-trace-compares" "$built"
    mkdir -p "$dir/bin"
    cp "$built/$HOST/release/fuzz" "$dir/bin/fuzz"
    local target status failed=()
    # Shares and bundles of the targets are made in memory.
    TMPDIR=$(mktemp -d /dev/shm/fuzz.XXXXXX)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
    python3 tests/fuzz/seeds.py "$dir/corpus"
    for target in "$@"; do
        mkdir -p "$dir/corpus/$target"
        say "$target for $seconds s"
        status=0
        FUZZ_TARGET=$target "$dir/bin/fuzz" "$dir/corpus/$target" -max_total_time="$seconds" \
            -artifact_prefix="$dir/$target-" -max_len=4096 -timeout=25 -rss_limit_mb=2048 -handle_xfsz=0 \
            -print_final_stats=1 -reload=0 -close_fd_mask=1 >"$dir/$target.log" 2>&1 || status=$?
        grep -E '^#[0-9]+.*(DONE|pulse)' "$dir/$target.log" | tail -n 1 | sed "s/^/fuzz: $target: /" >&2 || true
        if [ "$status" != 0 ]; then
            tail -n 40 "$dir/$target.log" >&2
            failed+=("$target")
        fi
    done
    [ ${#failed[@]} -eq 0 ] || { say "failed: ${failed[*]} (logs and inputs in $dir)"; exit 1; }
}

case ${1:-} in
coverage) exec tests/fuzz/coverage.sh ;;
'' | *[!0-9]*) sed -n '5,12s/^# \?//p' "$0" >&2; exit 2 ;;
*) fuzz "$@" ;;
esac
