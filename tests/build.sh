#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds everything that a user runs: the guest kernel, the agent in its initramfs, and `sandbox`.
set -euo pipefail
cd "$(dirname "$0")/.."

tests/host/packages.sh build
guest-kernel/build.sh target/lib/sandbox
agent/build.sh
guest-kernel/initramfs.sh target/x86_64-unknown-linux-gnu/release/agent target/lib/sandbox/initramfs.cpio

# Static, as the agent: looking for libraries costs each of the two processes of a start as much as what they do then.
target=x86_64-unknown-linux-gnu
LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=/usr/lib/x86_64-linux-gnu RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --release --quiet --locked --target "$target" -p runtime-shim
ln -f "target/$target/release/sandbox" target/release/sandbox
