#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Puts the file system test suites of others, and the libraries they need, into target/filesystem-tests. Built once (two
# or three minutes) and kept in the build cache. With `all` also dbench and fio, from Debian's packages.
set -euo pipefail

fsx=0.3.2
pjdfstest=0.2.2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=${SANDBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandbox-build}/filesystem-tests/$fsx-$pjdfstest
tools=$root/target/filesystem-tests

say() { echo "filesystem tests: $*" >&2; }
die() { say "$*"; exit 1; }

# build NAME VERSION
build() {
    [ -x "$cache/bin/$1" ] && return
    say "building $1 $2"
    local log
    log=$(mktemp)
    if ! CARGO_TARGET_DIR="$root/target/filesystem-build" cargo install --quiet --locked --root "$cache" \
        "$1@$2" >"$log" 2>&1; then
        tail -20 "$log" >&2
        rm -f "$log"
        die "crate $1 $2: cannot be built"
    fi
    rm -f "$log"
}

# copy PROGRAM: with its libraries, each where the loader looks for it.
copy() {
    mkdir -p "$tools/bin"
    cp -uL "$1" "$tools/bin/"
    # A static program has none, and ldd says so by failing.
    { ldd "$1" 2>/dev/null || true; } | sed -n 's|^[^/]*\(/[^ ]*\).*|\1|p' | sort -u | while read -r library; do
        mkdir -p "$tools$(dirname "$library")"
        cp -uL "$library" "$tools$library"
    done
}

build fsx "$fsx"
build pjdfstest "$pjdfstest"
rm -rf "$root/target/filesystem-build"
copy "$cache/bin/fsx"
copy "$cache/bin/pjdfstest"
# pjdfstest runs a copy of it, which busybox's cannot be.
copy /bin/sleep
if [ "${1:-}" = all ]; then
    "$root/tests/host/packages.sh" filesystem
    copy /usr/bin/dbench
    copy /usr/bin/fio
    copy /bin/busybox
    cp -u /usr/share/dbench/client.txt "$tools/"
fi
