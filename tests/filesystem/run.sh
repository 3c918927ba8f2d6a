#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs a file system test suite that others wrote in a container of `sandbox`, and of runc for comparison, on one ext4
# file system of the host: in the root file system of the container, and in a directory of the host bound into it.
# What it found is in docs/filesystem-tests.md.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: tests/filesystem/run.sh SUITE [RUNTIME...]
  SUITE    fsx        random reads, writes, mappings and truncations, checked against what they must give
           pjdfstest  what POSIX says about each system call
           dbench     what a file server's clients do
           fio        throughput of plain reads and writes
  RUNTIME  sandbox and runc, unless named; `host` for none
FSX_SEEDS, FSX_OPERATIONS and PJDFSTEST (parts of names) in the environment make the first two shorter or longer.
USAGE
    exit 2
}

case ${1:-} in
fsx | pjdfstest | dbench | fio) ;;
*) usage ;;
esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
"$root/tests/build.sh"
"$root/tests/host/packages.sh" host runtimes
"$root/tests/filesystem/tools.sh" all
export SANDBOX_HOST_ENV="${SANDBOX_HOST_ENV:-} FSX_SEEDS FSX_OPERATIONS PJDFSTEST"
exec "$root/tests/host/run" --memory 6144 --timeout 3000 -- python3 "$root/tests/filesystem/suites.py" "$@" </dev/null
