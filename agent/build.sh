#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the agent as a static binary.
set -euo pipefail

[ $# -le 1 ] || { echo "usage: agent/build.sh [OUT]" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit
target=x86_64-unknown-linux-gnu
built="${CARGO_TARGET_DIR:-target}/$target/release/agent"
out=${1:-$built}

# --target keeps the flag from procedural macros, which cannot be static. Small, since each boot unpacks it.
CARGO_PROFILE_RELEASE_OPT_LEVEL=z \
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --quiet --locked --release --package agent --target "$target" ||
    { echo "build.sh: package agent: build failed" >&2; exit 1; }
[ "$out" -ef "$built" ] || install -D -m 0755 "$built" "$out"
