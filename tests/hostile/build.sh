#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the hostile guest of tests/hostile_guest.rs, a kernel of its own: build.sh FILE
set -euo pipefail
[ $# = 1 ] || { echo "usage: $0 FILE" >&2; exit 2; }
here=$(dirname "$0")
mkdir -p "$(dirname "$1")"
gcc -std=gnu11 -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-stack-protector -fno-asynchronous-unwind-tables \
    -fcf-protection=none -mno-red-zone -mgeneral-regs-only -mcmodel=small \
    -static -no-pie -nostdlib -Wl,-T,"$here/link.ld" -Wl,--build-id=none -Wl,-z,max-page-size=4096 \
    -Wl,--no-warn-rwx-segments -o "$1" "$here/entry.S" "$here/main.c"
