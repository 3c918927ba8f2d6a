# SPDX-License-Identifier: Apache-2.0
#
# Reads a directory of the host and tries to change it, as root.
failed=0

refused() {
    if "$@" 2>&1; then
        echo "  DONE, and should have been refused: $*"
        failed=1
    else
        echo "  refused: $*"
    fi
}

echo "/mnt is a directory of the host: $(ls /mnt)"
echo "note.txt says: $(cat /mnt/note.txt)"
refused sh -c 'echo changed >/mnt/note.txt'
refused touch /mnt/new
refused rm /mnt/note.txt
refused mv /mnt/note.txt /mnt/moved
refused chmod 777 /mnt
refused mount -o remount,rw /mnt
exit $failed
