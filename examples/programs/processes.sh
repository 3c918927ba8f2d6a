# SPDX-License-Identifier: Apache-2.0
#
# Shows all processes that a container can see: its own. The two that sleep
# end with the first process.
sleep 1000 &
sleep 1000 &
ps -ef
echo "$(ls -d /proc/[0-9]* | wc -l) processes in /proc when ls and wc run; this shell is process $$"
