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
cargo build --release --quiet -p runtime-shim
