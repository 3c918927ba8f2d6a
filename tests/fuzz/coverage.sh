#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Line coverage of what is fuzzed, by the corpora in target/fuzz and the unit tests together. Called by run.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

HOST=x86_64-unknown-linux-gnu
dir=${FUZZ_DIR:-$PWD/target/fuzz}
tools=$(rustc --print sysroot)/lib/rustlib/$HOST/bin
[ -x "$tools/llvm-cov" ] || {
    echo "fuzz: llvm-cov of the compiler is missing: rustup component add llvm-tools" >&2
    exit 1
}
rm -rf "$dir/profiles"
mkdir -p "$dir/profiles"
TMPDIR=$(mktemp -d /dev/shm/fuzz.XXXXXX)
trap 'rm -rf "$TMPDIR"' EXIT
export TMPDIR LLVM_PROFILE_FILE="$dir/profiles/%p-%m.profraw"

RUSTFLAGS="--cfg fuzzing -A dead_code -C instrument-coverage" cargo build --quiet --release --target "$HOST" \
    --manifest-path tests/fuzz/Cargo.toml --target-dir "$dir/build-coverage"
fuzzer=$dir/build-coverage/$HOST/release/fuzz
for corpus in "$dir"/corpus/*/; do
    target=$(basename "$corpus")
    FUZZ_TARGET=$target "$fuzzer" "$corpus" -runs=0 -handle_xfsz=0 >"$dir/$target-coverage.log" 2>&1 ||
        echo "fuzz: $target fails on its corpus, see $dir/$target-coverage.log" >&2
done

objects=(-object "$fuzzer")
programs=$(RUSTFLAGS="-C instrument-coverage" cargo test --quiet --target "$HOST" --target-dir "$dir/build-coverage" \
    -p vmm -p agent-protocol -p runtime-shim --lib --no-run --message-format=json |
    python3 -c 'import json, sys
for line in sys.stdin:
    if program := json.loads(line).get("executable"): print(program)')
for program in $programs; do
    "$program" --quiet >"$dir/tests-coverage.log" 2>&1 || echo "fuzz: $program: a test failed" >&2
    objects+=(-object "$program")
done

"$tools/llvm-profdata" merge -sparse "$dir"/profiles/*.profraw -o "$dir/coverage.profdata"
"$tools/llvm-cov" export -format=lcov -instr-profile "$dir/coverage.profdata" "${objects[@]:1}" |
    python3 tests/fuzz/coverage.py
