#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages that building and testing need, by group.
# Returns at once, without calling apt, when everything asked for is present.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: tests/host/packages.sh GROUP...
  build     compilers and libraries for the guest kernel and the Rust packages
  host      QEMU, a Debian kernel (unpacked, not installed) and tools for tests/host/run
  runtimes  other OCI runtimes, to run the same tests against
  engines   Podman, Docker and containerd, not started
  rootfs    what makes root file systems of Debian
  filesystem  file system benchmarks, for tests/filesystem/run.sh
USAGE
    exit 2
}

# The emulated host needs these: QEMU 7.2 crashes its guest when the kernel
# patches its own text with two CPUs.
qemu_minimum=1:10
kernel_series=6.12

cache=${SANDBOX_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sandbox-build}

say() { echo "packages.sh: $*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=600 -q -y "$@"
}

# apt waits for the dpkg lock but not for the lock on its lists.
update() {
    local log attempt
    log=$(mktemp)
    say "refreshing the package lists"
    for attempt in 1 2 3 4 5 6 7 8 9 10 11 12; do
        if apt_get update "$@" >"$log" 2>&1; then
            rm -f "$log"
            return
        fi
        grep -q 'Could not get lock' "$log" || break
        sleep 5
    done
    tail -5 "$log" >&2
    rm -f "$log"
    die "apt-get update failed (attempt $attempt)"
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null || true)" = installed ]
}

candidate() {
    LC_ALL=C apt-cache policy "$1" | sed -n 's/^ *Candidate: //p' | grep -v '(none)' || true
}

install() {
    local missing=() package
    for package in "$@"; do
        installed "$package" || missing+=("$package")
    done
    install_now "${missing[@]}"
}

# install_now [-t SUITE] PACKAGE...
install_now() {
    local suite=() package log
    if [ "${1:-}" = -t ]; then
        suite=(-t "$2")
        shift 2
    fi
    [ $# -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || say "not root: using sudo for apt-get"
    for package in "$@"; do
        [ -n "$(candidate "$package")" ] || { update; break; }
    done
    for package in "$@"; do
        [ -n "$(candidate "$package")" ] || die "package $package: not in any apt source"
    done
    say "installing $*"
    log=$(mktemp)
    if ! apt_get install --no-install-recommends "${suite[@]}" "$@" >"$log" 2>&1; then
        # Lists older than the mirror name files that are gone.
        update
        apt_get install --no-install-recommends "${suite[@]}" "$@" >"$log" 2>&1 ||
            install_one_by_one "$log" "${suite[@]}" -- "$@"
    fi
    rm -f "$log"
}

# The tests start their engines in the emulated host; none is to run on this
# machine because it was installed. policy-rc.d is how Debian asks.
without_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    as_root tee "$policy" <<<$'#!/bin/sh\nexit 101' >/dev/null
    as_root chmod 755 "$policy"
    trap 'as_root rm -f "$policy"' EXIT
    "$@" || status=$?
    as_root rm -f "$policy"
    trap - EXIT
    return $status
}

# After a failure of the whole set, so that the message names the package.
install_one_by_one() {
    local log=$1 options=() package
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    for package in "$@"; do
        apt_get install --no-install-recommends "${options[@]}" "$package" >"$log" 2>&1 || {
            tail -15 "$log" >&2
            rm -f "$log"
            die "package $package: cannot be installed"
        }
    done
}

codename() {
    . /etc/os-release
    echo "${VERSION_CODENAME:?no VERSION_CODENAME in os-release}"
}

# Adds CODENAME-backports by repeating the apt source that CODENAME itself
# comes from with another suite: same mirror, same key, same options.
add_backports() {
    local suite=$1-backports entry file stanza
    if apt-get indextargets --format '$(CODENAME) $(SUITE)' 'Created-By: Packages' |
        tr ' ' '\n' | grep -qx "$suite"; then
        return
    fi
    entry=$(apt-get indextargets --format '$(SOURCESENTRY) $(LABEL) $(CODENAME)' 'Created-By: Packages' |
        awk -v codename="$1" '$2 == "Debian" && $3 == codename { print $1; exit }')
    if [ -z "$entry" ]; then
        update
        entry=$(apt-get indextargets --format '$(SOURCESENTRY) $(LABEL) $(CODENAME)' 'Created-By: Packages' |
            awk -v codename="$1" '$2 == "Debian" && $3 == codename { print $1; exit }')
    fi
    [ -n "$entry" ] || die "no apt source for Debian $1 to derive $suite from"
    file=${entry%:*}
    case $file in
    *.sources)
        stanza=$(awk -v codename="$1" -v suite="$suite" '
            BEGIN { RS = ""; FS = "\n" }
            {
                wanted = 0
                for (i = 1; i <= NF; i++)
                    if ($i ~ /^Suites:/ && (" " substr($i, 8) " ") ~ ("[ \t]" codename "[ \t]")) wanted = i
                if (!wanted) next
                for (i = 1; i <= NF; i++)
                    if ($i !~ /^#/) print (i == wanted ? "Suites: " suite : $i)
                exit
            }' "$file")
        file=sandbox-backports.sources
        ;;
    *)
        stanza=$(awk -v codename="$1" -v suite="$suite" '
            $1 == "deb" { for (i = 2; i <= NF; i++) if ($i == codename) { $i = suite; print; exit } }' "$file")
        file=sandbox-backports.list
        ;;
    esac
    [ -n "$stanza" ] || die "apt source $entry: no stanza for $1 found to derive $suite from"
    [ "$(id -u)" = 0 ] || say "not root: using sudo to add the apt source $file"
    say "adding $suite as /etc/apt/sources.list.d/$file"
    as_root tee "/etc/apt/sources.list.d/$file" <<<"$stanza" >/dev/null
    update
}

qemu_present() {
    local version
    installed qemu-system-x86 || return 1
    version=$(dpkg-query -W -f '${Version}' qemu-system-x86)
    dpkg --compare-versions "$version" ge "$qemu_minimum"
}

# The suite to take QEMU and the kernel from: backports where the release's
# own are too old.
newer_suite() {
    local release=$1 version
    version=$(candidate qemu-system-x86)
    if [ -n "$version" ] && dpkg --compare-versions "$version" ge "$qemu_minimum"; then
        echo "$release"
    else
        echo "$release-backports"
    fi
}

install_qemu() {
    local release suite
    qemu_present && return
    release=$(codename)
    suite=$(newer_suite "$release")
    [ "$suite" = "$release" ] || add_backports "$release"
    install_now -t "$suite" qemu-system-x86
    qemu_present || die "package qemu-system-x86: older than $qemu_minimum even in $suite"
}

kernel_present() {
    compgen -G "$cache/host/kernel/linux-image-*/lib/modules/*/modules.dep" >/dev/null
}

# The real kernel package that a series' newest build is in, not the metapackage.
kernel_package() {
    apt-cache search --names-only "^linux-image-${kernel_series//./\\.}\\.[0-9]+.*-amd64\$" |
        awk '{ print $1 }' | grep -vE 'cloud|rt-|unsigned|dbg' | sort -V | tail -1
}

# Unpacked and not installed: an installed kernel would enter this machine's
# boot menu and rebuild its initramfs.
unpack_kernel() {
    local release package directory
    kernel_present && return
    package=$(kernel_package)
    if [ -z "$package" ]; then
        release=$(codename)
        add_backports "$release"
        package=$(kernel_package)
    fi
    if [ -z "$package" ]; then
        update
        package=$(kernel_package)
    fi
    [ -n "$package" ] || die "package linux-image-$kernel_series*-amd64: not in any apt source"
    mkdir -p "$cache/host/kernel"
    directory=$(mktemp -d "$cache/host/kernel/.unpack.XXXXXX")
    say "unpacking $package (about 100 MB to fetch, 500 MB unpacked)"
    (
        cd "$directory"
        apt-get -q -o APT::Sandbox::User=root download "$package" >log 2>&1 ||
            { tail -5 log >&2; exit 1; }
        dpkg-deb -x ./*.deb tree
        # Where a package goes by the merged /usr, tests/host/run need not care.
        if [ -d tree/usr/lib/modules ]; then mkdir -p tree/lib && mv tree/usr/lib/modules tree/lib/; fi
        # Decompressed once here and not at each boot, where it is emulated.
        find tree/lib/modules -name '*.ko.xz' -print0 | xargs -0 -r -P "$(nproc)" -n 200 xz -d
        for modules in tree/lib/modules/*; do
            PATH=$PATH:/usr/sbin:/sbin depmod -b tree "${modules##*/}"
        done
    ) || { rm -rf "$directory"; die "package $package: cannot be downloaded and unpacked"; }
    mv -T "$directory/tree" "$cache/host/kernel/$package" 2>/dev/null || kernel_present ||
        die "package $package: cannot be put into $cache/host/kernel"
    rm -rf "$directory"
}

group() {
    case $1 in
    build)
        install build-essential flex bison bc libelf-dev libssl-dev rsync cpio xz-utils zstd kmod \
            libseccomp-dev libcap-ng-dev pkg-config python3 perl ca-certificates curl git
        ;;
    host)
        install_qemu
        install busybox-static gcc libc6-dev python3 kmod xz-utils zstd iproute2 iperf3 iptables nftables e2fsprogs
        unpack_kernel
        ;;
    runtimes) install runc crun runsc ;;
    engines)
        without_services install podman conmon netavark aardvark-dns catatonit \
            docker.io tini containerd containernetworking-plugins runc crun iptables iproute2
        ;;
    rootfs) install mmdebstrap debootstrap ;;
    filesystem) install dbench fio busybox-static ;;
    *) usage ;;
    esac
}

[ $# -gt 0 ] || usage
for name in "$@"; do
    case $name in
    build | host | runtimes | engines | rootfs | filesystem) ;;
    *) usage ;;
    esac
done
command -v dpkg-query >/dev/null || die "dpkg-query not found: not a Debian system"
for name in "$@"; do
    group "$name"
done
