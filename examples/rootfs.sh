#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a Debian root file system with Python in it, from the Debian mirror that this machine's own apt uses.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: examples/rootfs.sh [DIR]
  DIR  where it goes (default: target/rootfs); made once, and anew when the list of packages changes
USAGE
    exit 2
}

suite=bookworm
variant=minbase
packages=(python3 procps iproute2 util-linux libcap2-bin attr strace)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# What nobody reads in a container; the copyright files stay.
trim=(
    'path-exclude=/usr/share/doc/*' 'path-include=/usr/share/doc/*/copyright'
    'path-exclude=/usr/share/man/*' 'path-exclude=/usr/share/info/*'
    'path-exclude=/usr/share/locale/*' 'path-exclude=/usr/share/i18n/*'
)

# Run by mmdebstrap with the new root as $1. An ordinary user for the examples;
# nothing of this machine's name or resolver.
customize='set -e
chroot "$1" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
echo debian > "$1/etc/hostname"
printf "127.0.0.1 localhost\n::1 localhost\n" > "$1/etc/hosts"
: > "$1/etc/resolv.conf"
rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*'

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
cache=${SANDBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandbox-build}

say() { echo "rootfs: $*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

case ${1:-} in
-*) usage ;;
esac
[ $# -le 1 ] || usage
directory=$(realpath -m "${1:-$root/target/rootfs}")

key=$({ printf '%s\n' "$suite" "$variant" "${packages[@]}" "${trim[@]}" "$customize"; } | sha256sum | cut -c1-16)
archive=$cache/rootfs/$suite-$key.tar
# Beside the root and not in it, where a container would see and could change it.
stamp=$directory.key

if [ -d "$directory" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi

# The address of Debian's archive ($1: label in its Release file) for a suite
# ($2) of this machine; any suite of that archive is under the same address.
mirror() {
    apt-get indextargets --format '$(LABEL)|$(SUITE)|$(REPO_URI)' 'Created-By: Packages' |
        awk -F'|' -v label="$1" '$1 == label { print $3; exit }'
}

sources() {
    local archive security
    archive=$(mirror Debian)
    if [ -z "$archive" ]; then
        say "refreshing the package lists"
        as_root apt-get -o DPkg::Lock::Timeout=600 -q update >/dev/null || die "apt-get update failed"
        archive=$(mirror Debian)
    fi
    [ -n "$archive" ] || die "no Debian archive in this machine's apt sources"
    security=$(mirror Debian-Security)
    echo "deb [signed-by=$keyring] $archive $suite main"
    echo "deb [signed-by=$keyring] $archive $suite-updates main"
    [ -z "$security" ] || echo "deb [signed-by=$keyring] $security $suite-security main"
}

proxies() {
    local scheme value
    for scheme in http https; do
        value=$(apt-config shell value "Acquire::$scheme::Proxy/d")
        eval "$value"
        [ -z "${value:-}" ] || echo "Acquire::$scheme::Proxy \"$value\";"
    done
}

build() {
    local list partial log option=() line exclude
    "$root/tests/host/packages.sh" rootfs
    [ -r "$keyring" ] || die "package debian-archive-keyring: $keyring is missing"
    for exclude in "${trim[@]}"; do option+=(--dpkgopt="$exclude"); done
    while read -r line; do option+=(--aptopt="$line"); done < <(proxies)
    list=$(sources)
    mkdir -p "$cache/rootfs"
    partial=$(mktemp "$cache/rootfs/.partial.XXXXXX")
    log=$(mktemp)
    trap 'rm -f "$partial" "$log"' EXIT
    say "making Debian $suite with ${packages[*]} (about 60 MB to fetch, two minutes)"
    # Progress: the steps that mmdebstrap names, without its bars.
    if ! as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 \
        mmdebstrap --mode=root --variant="$variant" --architectures=amd64 --format=tar \
        --include="$(IFS=,; echo "${packages[*]}")" --skip=output/dev "${option[@]}" \
        --customize-hook="$customize" "$suite" - - <<<"$list" 2> >(tee "$log" | progress) >"$partial"; then
        grep -E '^E:|[Ee]rror|Unable|dpkg:' "$log" | tail -15 >&2 || tail -15 "$log" >&2
        die "Debian $suite: mmdebstrap failed (mirror and packages above)"
    fi
    mv "$partial" "$archive"
    rm -f "$log"
    trap - EXIT
}

progress() {
    sed -u -n -E '/^I: (running apt|downloading|extracting|installing|creating)/s/^I: (.*)\.\.\.$/rootfs:   \1/p' >&2
}

unpack() {
    local temporary
    mkdir -p "$(dirname "$directory")"
    temporary=$(mktemp -d "$(dirname "$directory")/.rootfs.XXXXXX")
    trap 'as_root rm -rf "$temporary"' EXIT
    say "unpacking Debian $suite to $directory"
    # A device node has no business in a root that others serve to a guest.
    as_root tar -x -f "$archive" -C "$temporary" --numeric-owner --same-permissions --acls \
        --xattrs --xattrs-include='*' --exclude='./dev/*' || die "$archive: cannot be unpacked (delete it to make it anew)"
    as_root mkdir -p "$temporary/dev" "$temporary/proc" "$temporary/sys" "$temporary/example"
    as_root chown 0:0 "$temporary"
    as_root chmod 755 "$temporary"
    rm -f "$stamp"
    if [ -e "$directory" ]; then
        as_root mv -T "$directory" "$temporary.old"
    fi
    as_root mv -T "$temporary" "$directory"
    trap - EXIT
    as_root rm -rf "$temporary.old"
    echo "$key" >"$stamp.$$"
    mv "$stamp.$$" "$stamp"
}

[ "$(id -u)" = 0 ] || say "not root: using sudo, so that files have their real owners"
[ -s "$archive" ] || build
unpack
