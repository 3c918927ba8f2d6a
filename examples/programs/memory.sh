# SPDX-License-Identifier: Apache-2.0
#
# Eats memory until the limit of 100 MB kills the eater; this shell lives on.
python3 /example/memory.py
status=$?
echo "python3 ended with status $status (137 is 128 + SIGKILL); this shell, process $$, still runs"
exit $status
