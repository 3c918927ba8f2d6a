#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes the OCI bundle of an example and prints where it is.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

names() { sed -n 's/^def \([a-z0-9]*\)(config):$/\1/p' "$here/bundle.py" | paste -sd' '; }

usage() {
    cat >&2 <<USAGE
usage: examples/bundle.sh NAME [DIR]
  NAME  one of: $(names); examples/README.md says what each shows
  DIR   where the bundle goes (default: target/bundles/NAME)
USAGE
    exit 2
}

say() { echo "bundle: $*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

[ $# -ge 1 ] && [ $# -le 2 ] || usage
name=$1
case " $(names) " in
*" $name "*) ;;
*) usage ;;
esac
directory=$(realpath -m "${2:-$root/target/bundles/$name}")
rootfs=$root/target/rootfs

command -v python3 >/dev/null || die "package python3: missing"
"$here/rootfs.sh"

key=$({ cat "$rootfs.key" "$here"/bundle.{sh,py} "$here/config.json" "$here"/programs/*; echo "$rootfs"; } |
    sha256sum | cut -c1-16)
stamp=$directory/.key
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    echo "$directory"
    exit 0
fi
if [ -e "$directory" ] && [ ! -e "$stamp" ]; then
    die "$directory: exists and is not a bundle made by this script"
fi

mkdir -p "$(dirname "$directory")"
temporary=$(mktemp -d "$(dirname "$directory")/.$name.XXXXXX")
trap 'as_root rm -rf "$temporary"' EXIT
chmod 755 "$temporary"
python3 "$here/bundle.py" "$name" "$rootfs" >"$temporary/config.json"
mkdir "$temporary/programs"
cp "$here"/programs/* "$temporary/programs/"
if [ "$name" = readonly ]; then
    mkdir "$temporary/shared"
    echo "a file of the host" >"$temporary/shared/note.txt"
fi
if grep -q '"readonly": false' "$temporary/config.json"; then
    # It will be written to, so it is this bundle's own.
    say "copying the root file system for $name"
    as_root cp -a --reflink=auto "$rootfs" "$temporary/rootfs"
    as_root cp "$here"/programs/* "$temporary/rootfs/example/"
fi
echo "$key" >"$temporary/.key"
if [ -e "$directory" ]; then
    as_root mv -T "$directory" "$temporary/old"
fi
mv -T "$temporary" "$directory"
trap - EXIT
as_root rm -rf "$directory/old"
echo "$directory"
