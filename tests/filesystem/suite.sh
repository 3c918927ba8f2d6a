#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# suite.sh SUITE DIRECTORY OTHER: runs in the container, or on the host below its file system. Prints what the suite says that
# is worth keeping, and its result. OTHER is on another file system. FSX_SEEDS, FSX_OPERATIONS and PJDFSTEST (names of tests)
# make it shorter.
set -u
suite=$1
here=${0%/*}
cd "$2" || exit 1
log=/tmp/suite.log
case $suite in
fsx)
    failed=0
    seeds=${FSX_SEEDS:-1 2 3 4}
    operations=${FSX_OPERATIONS:-1000}
    for seed in $seeds; do
        fsx -f "$here/fsx.toml" -N "$operations" -S "$seed" "file$seed" >$log 2>&1 || {
            failed=$((failed + 1))
            echo "seed $seed:"
            tail -n 30 $log
        }
    done
    echo "fsx: seeds $seeds, $operations operations each, $failed failed"
    [ $failed = 0 ]
    ;;
pjdfstest)
    NO_COLOR=1 pjdfstest -c "$here/pjdfstest.toml" -s "$3" -p . ${PJDFSTEST:-} >$log 2>&1
    status=$?
    grep -A 1 FAILED $log
    grep '^Summary' $log
    exit $status
    ;;
dbench)
    dbench -c /client.txt -D . -t 20 4 >$log 2>&1 || { tail -n 20 $log; exit 1; }
    grep '^Throughput' $log
    ;;
fio)
    fio --output-format=terse --terse-version=3 --directory=. "$here/fio.ini" >$log 2>&1 || { tail -n 20 $log; exit 1; }
    # Fields of fio's terse format 3: name, KiB/s and IOPS read, KiB/s and IOPS written.
    awk -F';' 'NF > 50 { printf "%-20s read %8d KiB/s %7d IOPS, write %8d KiB/s %7d IOPS\n", $3, $7, $8, $48, $49 }' $log
    ;;
esac
