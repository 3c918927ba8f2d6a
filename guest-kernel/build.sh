#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Builds the guest kernel: Debian's Linux source package plus the fragments in config/, into OUTDIR/vmlinux.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: guest-kernel/build.sh [--update] [OUTDIR]
  OUTDIR    where vmlinux, vmlinux.version and vmlinux.config go (default: target/lib/sandbox)
  --update  ask apt for a newer source package even if OUTDIR is up to date
USAGE
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
cache=${SANDBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandbox-build}
package=linux-source-6.12

say() { echo "guest-kernel: $*" >&2; }
die() { say "$*"; exit 1; }

update=
outdir=$root/target/lib/sandbox
while [ $# -gt 0 ]; do
    case $1 in
    --update) update=yes ;;
    -*) usage ;;
    *) outdir=$1 ;;
    esac
    shift
done

fragments=("$here"/config/*.config)

# The fragments without their comments, which change no kernel.
settings() { grep -hE '^(# )?CONFIG_' "${fragments[@]}"; }

# All that decides what comes out, but for the version of the source package.
recipe() {
    { cat "${BASH_SOURCE[0]}"; settings; gcc -dumpfullversion 2>/dev/null || true; } | sha256sum | cut -c1-16
}

built_from() { sed -n "s/^$2: //p" "$1/vmlinux.version" 2>/dev/null || true; }

present() { [ -s "$1/vmlinux" ] && [ -s "$1/vmlinux.version" ] && [ -s "$1/vmlinux.config" ]; }

# deliver DIRECTORY: each file is whole at every moment, vmlinux.version last.
deliver() {
    local name
    mkdir -p "$outdir"
    for name in vmlinux vmlinux.config vmlinux.version; do
        cp --sparse=always "$1/$name" "$outdir/.$name.$$"
        mv "$outdir/.$name.$$" "$outdir/$name"
    done
    say "$(built_from "$outdir" linux) in $outdir/vmlinux"
}

tools_missing() {
    local tool
    for tool in gcc make flex bison bc xz python3; do
        command -v "$tool" >/dev/null || { echo "$tool"; return; }
    done
    [ -e /usr/include/libelf.h ] || echo libelf.h
}

install_tools() {
    local missing
    missing=$(tools_missing)
    [ -n "$missing" ] || return 0
    say "$missing is missing: installing the build packages"
    "$root/tests/host/packages.sh" build
    missing=$(tools_missing)
    [ -z "$missing" ] || die "$missing: still missing after tests/host/packages.sh build"
}

candidate() { LC_ALL=C apt-cache policy "$package" | sed -n 's/^ *Candidate: //p' | grep -v '(none)' || true; }

refresh_lists() {
    say "refreshing the package lists"
    if [ "$(id -u)" = 0 ]; then
        apt-get -q -o DPkg::Lock::Timeout=600 update >/dev/null
    else
        sudo apt-get -q -o DPkg::Lock::Timeout=600 update >/dev/null
    fi || die "apt-get update failed"
}

source_version() {
    local version
    version=$(candidate)
    if [ -z "$version" ]; then
        refresh_lists
        version=$(candidate)
    fi
    [ -n "$version" ] || die "package $package: not in any apt source"
    echo "$version"
}

# unpack_source VERSION TREE: without the parts that neither Kconfig nor this build reads, two thirds of the files.
unpack_source() {
    local version=$1 tree=$2 scratch
    [ ! -d "$tree" ] || return 0
    scratch=$(mktemp -d "$cache/.linux-source.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    say "fetching $package $version (about 150 MB)"
    (
        cd "$scratch"
        apt-get -q -o APT::Sandbox::User=root download "$package=$version" >log 2>&1 || {
            # Lists older than the mirror name files that are gone.
            refresh_lists
            apt-get -q -o APT::Sandbox::User=root download "$package=$version" >log 2>&1
        } || { tail -3 log >&2; die "package $package $version: cannot be downloaded"; }
    ) || exit 1
    say "unpacking $package"
    mkdir "$scratch/tree"
    dpkg-deb --fsys-tarfile "$scratch"/*.deb | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        xz -dc -T0 | tar -x -C "$scratch/tree" --strip-components=1 \
        --exclude='*/Documentation/*.rst' --exclude='*/Documentation/*.yaml' --exclude='*/Documentation/*.txt' \
        --exclude='*/drivers/gpu/*.[ch]' --exclude='*/drivers/media/*.[ch]' --exclude='*/drivers/infiniband/*.[ch]' \
        --exclude='*/drivers/net/ethernet/*.[ch]' --exclude='*/drivers/net/wireless/*.[ch]' \
        --exclude='*/drivers/staging/*.[ch]' --exclude='*/drivers/scsi/*.[ch]' --exclude='*/drivers/usb/*.[ch]' \
        --exclude='*/sound/*.[ch]' --exclude='*/tools/testing' --exclude='*/tools/perf' ||
        die "package $package $version: cannot be unpacked"
    mv -T "$scratch/tree" "$tree" 2>/dev/null || [ -d "$tree" ] || die "$tree: cannot be written"
    rm -rf "$scratch"
    trap - EXIT
}

# A symbol that two fragments set would be decided by their order.
check_fragments() {
    local twice
    twice=$(sed -n -E 's/^(# )?(CONFIG_[A-Za-z0-9_]+)(=.*| is not set)$/\2/p' "${fragments[@]}" | sort | uniq -d)
    [ -z "$twice" ] || die "set more than once in config/: "$twice
}

# verify_config CONFIG: Kconfig drops in silence what it does not know or whose dependencies are unmet.
verify_config() {
    local config=$1 fragment line symbol failed=
    local -A got
    while IFS= read -r line; do
        [[ $line =~ ^(CONFIG_[A-Za-z0-9_]+)= ]] && got[${BASH_REMATCH[1]}]=$line
    done <"$config"
    for fragment in "${fragments[@]}"; do
        while IFS= read -r line; do
            if [[ $line =~ ^(CONFIG_[A-Za-z0-9_]+)= ]]; then
                symbol=${BASH_REMATCH[1]}
                [ "${got[$symbol]:-}" = "$line" ] && continue
                say "config/${fragment##*/}: asked for $line, got ${got[$symbol]:-it unset}"
                failed=yes
            elif [[ $line =~ ^#\ (CONFIG_[A-Za-z0-9_]+)\ is\ not\ set$ ]]; then
                symbol=${BASH_REMATCH[1]}
                [ -z "${got[$symbol]:-}" ] && continue
                say "config/${fragment##*/}: asked for no $symbol, got ${got[$symbol]}"
                failed=yes
            elif [[ $line == CONFIG_* || $line == "# CONFIG_"* ]]; then
                say "config/${fragment##*/}: not a setting: $line"
                failed=yes
            fi
        done <"$fragment"
    done
    [ -z "$failed" ] || die "the configuration is not what the fragments ask for"
}

# run_make LOG ARGUMENTS...: make, with a line of progress every fifteen seconds.
run_make() {
    local log=$1 ticker status=0
    shift
    # The sleep may outlive the build and must hold neither the caller's output nor the lock.
    while sleep 15 >/dev/null 2>&1 9>&-; do
        say "$(grep -cE '^  (CC|AS|LD|AR) ' "$log" || true) objects built, $SECONDS s"
    done &
    ticker=$!
    make "$@" >"$log" 2>&1 || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    [ "$status" = 0 ] || { grep -E 'error|Error|\*\*\*' "$log" | head -20 >&2; die "make failed, see $log"; }
}

# build VERSION TREE ENTRY
build() {
    local version=$1 tree=$2 entry=$3 objects=$cache/linux-build-$1 scratch started
    # One build at a time; the object tree is kept, so that a changed fragment rebuilds what it touches.
    mkdir -p "$objects"
    exec 9>"$objects/.lock"
    flock -n 9 || { say "waiting for another build in $objects"; flock 9; }
    ! present "$entry" || return 0

    # Same input, same bytes: templates of booted guests are keyed by the kernel's hash.
    export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=sandbox KBUILD_BUILD_HOST=sandbox
    export KBUILD_BUILD_VERSION=1 LC_ALL=C
    unset MAKEFLAGS MAKELEVEL MFLAGS

    settings >"$objects/fragments"
    make -s -C "$tree" O="$objects" KCONFIG_ALLCONFIG="$objects/fragments" allnoconfig >"$objects/config.log" 2>&1 ||
        { tail -20 "$objects/config.log" >&2; die "allnoconfig failed"; }
    verify_config "$objects/.config"

    say "building $package $version"
    started=$SECONDS
    run_make "$objects/build.log" -C "$tree" O="$objects" -j"$(nproc)" KCFLAGS=-pipe vmlinux

    scratch=$(mktemp -d "$cache/.kernel.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    strip --strip-all -o "$scratch/vmlinux" "$objects/vmlinux"
    chmod 0644 "$scratch/vmlinux"
    LC_ALL=C readelf -n "$scratch/vmlinux" | grep -qE 'Xen +0x[0-9a-f]+.*0x00000012|Unknown note type: \(0x00000012\)' ||
        die "vmlinux: no PVH entry note"
    cp "$objects/.config" "$scratch/vmlinux.config"
    {
        echo "linux: $(<"$objects/include/config/kernel.release")"
        echo "source: $package $version"
        echo "compiler: gcc $(gcc -dumpfullversion)"
        echo "recipe: $recipe"
        echo "config: sha256:$(sha256sum <"$objects/.config" | cut -d' ' -f1)"
        echo "vmlinux: sha256:$(sha256sum <"$scratch/vmlinux" | cut -d' ' -f1)"
    } >"$scratch/vmlinux.version"
    chmod 0755 "$scratch"
    rm -rf "$entry"
    mv -T "$scratch" "$entry"
    trap - EXIT
    say "built in $((SECONDS - started)) s, $(stat -c %s "$entry/vmlinux") bytes"
}

recipe=$(recipe)
if [ -z "$update" ] && present "$outdir" && [ "$(built_from "$outdir" recipe)" = "$recipe" ]; then
    exit 0
fi
check_fragments
install_tools
# The compiler may only be there now.
recipe=$(recipe)
[ -z "$update" ] || refresh_lists
version=$(source_version)
entry=$cache/kernel-$version-$recipe
if ! present "$entry"; then
    mkdir -p "$cache"
    unpack_source "$version" "$cache/linux-source-$version"
    build "$version" "$cache/linux-source-$version" "$entry"
fi
deliver "$entry"
