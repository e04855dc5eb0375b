#!/bin/sh
# Installs what the demo or the tests need on a Debian 12 machine, and only
# what is not there yet.
#
#     sudo sh tests/install-tools.sh run     to run the daemon with a containerd
#     sudo sh tests/install-tools.sh demo    the same, and to build the daemon
#     sudo sh tests/install-tools.sh bench   the same, and to measure it
#     sudo sh tests/install-tools.sh dist    the same, and to make releases of it
#     sudo sh tests/install-tools.sh test    the same, and to test it
#
# A script in this directory can also read it with `.` and call
# `install_tools demo`. It then has
#
#   PATH                 with cargo, rustc and the system's sbin directories
#   BUSYBOX              a statically linked busybox
#   as_builder COMMAND   runs COMMAND (cargo, mostly) as the user that owns the
#                        checkout, if that user called sudo, so that nothing of
#                        root's is left in the target directory or ~/.cargo;
#                        otherwise as root
#
# Rust is the one on PATH or in ~/.cargo/bin (of root, and of the user that
# called sudo) if it is new enough, otherwise Debian's packages for it.

set -eu

# Where `su` without `-` leaves a user, neither mkfs.ext4 nor runc is found.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

# Scripts that read this file lie beside it. One that was called by a relative
# path and has changed its directory since must be in the checkout by now.
tools_checkout=$(cd "$(dirname "$0")/.." 2>/dev/null && pwd) || tools_checkout=
[ -n "$tools_checkout" ] && [ -e "$tools_checkout/tests/install-tools.sh" ] ||
    tools_checkout=$(pwd)

# Packages to install.
tools_missing=
# The user who called sudo: name, home, ids. Empty: nobody did.
tools_user=
tools_user_home=
tools_user_uid=
tools_user_gid=
# Does that user build, not root?
tools_user_builds=no
# The Rust in use: version, the directory it was found in, its sysroot.
tools_rust_version=
tools_rust_dir=
tools_sysroot=
# What was wrong with a Rust that is there but not used.
tools_rust_refused=

tools_say() {
    echo "tools: $*"
}

tools_die() {
    echo "tools: $*" >&2
    exit 1
}

tools_has() {
    command -v "$1" >/dev/null 2>&1
}

# Notes a package as missing, once.
tools_miss() {
    case "$tools_missing " in
    *" $1 "*) ;;
    *) tools_missing="$tools_missing $1" ;;
    esac
}

# tools_need COMMAND PACKAGE
tools_need() {
    tools_has "$1" || tools_miss "$2"
}

# tools_need_path PATH PACKAGE
tools_need_path() {
    [ -e "$1" ] || tools_miss "$2"
}

# A container has none of the host's libraries. ldd fails on a static program.
tools_static() {
    tools_has "$1" && ! ldd "$(command -v "$1")" >/dev/null 2>&1
}

# Is a package installed?
tools_installed() {
    case $(dpkg-query -W -f '${Status}' "$1" 2>/dev/null || true) in
    *' installed') return 0 ;;
    *) return 1 ;;
    esac
}

# The version of PACKAGE that apt would install, nothing if there is none.
tools_candidate() {
    LC_ALL=C apt-cache policy "$1" 2>/dev/null |
        sed -n -e '/(none)/d' -e 's/^ *Candidate: \([0-9]*:\)\{0,1\}//p'
}

# The oldest Rust that this crate builds with.
tools_rust_wanted() {
    sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$tools_checkout/Cargo.toml"
}

# Is Rust VERSION (1.95.0, with or without more behind it) new enough for this
# crate?
tools_rust_suffices() {
    tools_wanted=$(tools_rust_wanted)
    tools_wanted_rest=${tools_wanted#*.}
    tools_given_rest=${1#*.}
    # What is not a number is not a version; the tests below then fail.
    [ "${1%%.*}" -gt "${tools_wanted%%.*}" ] 2>/dev/null && return 0
    [ "${1%%.*}" -eq "${tools_wanted%%.*}" ] 2>/dev/null &&
        [ "${tools_given_rest%%.*}" -ge "${tools_wanted_rest%%.*}" ] 2>/dev/null
}

# Learns who called sudo. That user builds if the checkout, and what was built
# in it before, belongs to them.
tools_find_user() {
    [ "$(id -u)" = 0 ] || return 0
    case ${SUDO_USER:-root} in
    root) return 0 ;;
    esac
    tools_entry=$(getent passwd "$SUDO_USER") || return 0
    tools_user=$SUDO_USER
    tools_user_home=$(echo "$tools_entry" | cut -d: -f6)
    tools_user_uid=$(echo "$tools_entry" | cut -d: -f3)
    tools_user_gid=$(echo "$tools_entry" | cut -d: -f4)
    tools_user_builds=yes
    for tools_path in "$tools_checkout" "$tools_checkout/target"; do
        if [ -e "$tools_path" ] && [ "$(stat -c %u "$tools_path")" != "$tools_user_uid" ]; then
            tools_user_builds=no
        fi
    done
}

# Runs a command as the user who called sudo. --init-groups and HOME: so that
# the user's programs find what they find when the user runs them.
tools_as_user() {
    setpriv --reuid="$tools_user_uid" --regid="$tools_user_gid" --init-groups \
        env HOME="$tools_user_home" USER="$tools_user" LOGNAME="$tools_user" "$@"
}

as_builder() {
    if [ "$tools_user_builds" = yes ]; then
        tools_as_user "$@"
    else
        "$@"
    fi
}

# tools_try_rust RUNNER DIR: tries the Rust in DIR as the user that RUNNER
# (tools_as_user or env) makes. True if it is there, works and is new enough;
# PATH then has it.
tools_try_rust() {
    [ -x "$2/cargo" ] && [ -x "$2/rustc" ] || return 1
    # rustc and cargo of one toolchain or one Debian have one version; cargo
    # need only start.
    tools_version=$("$1" PATH="$2:$PATH" rustc --version 2>/dev/null) || return 1
    "$1" PATH="$2:$PATH" cargo --version >/dev/null 2>&1 || return 1
    tools_version=${tools_version#rustc }
    tools_version=${tools_version%% *}
    if ! tools_rust_suffices "$tools_version"; then
        case $tools_rust_refused in
        *" in $2"*) ;;
        *) tools_rust_refused="${tools_rust_refused:+$tools_rust_refused, }$tools_version in $2" ;;
        esac
        return 1
    fi
    tools_sysroot=$("$1" PATH="$2:$PATH" rustc --print sysroot) || return 1
    # What rustup puts into ~/.cargo/bin looks for its toolchain in the caller's
    # home, so root could not use a user's. The toolchain's own programs need
    # no home.
    tools_bin=$2
    [ ! -x "$tools_sysroot/bin/cargo" ] || tools_bin=$tools_sysroot/bin
    as_builder env PATH="$tools_bin:$PATH" cargo --version >/dev/null 2>&1 || return 1
    tools_rust_version=$tools_version
    tools_rust_dir=$2
    [ "$(command -v cargo)" = "$tools_bin/cargo" ] || PATH=$tools_bin:$PATH
}

# Tries every place where Rust may be. False if none has one new enough.
tools_find_rust() {
    tools_rust_refused=
    tools_on_path=$(command -v cargo || true)
    tools_on_path=${tools_on_path%/cargo}
    if [ -n "$tools_user" ]; then
        for tools_dir in "$tools_user_home/.cargo/bin" "$tools_on_path"; do
            tools_try_rust tools_as_user "$tools_dir" && return 0
        done
    fi
    tools_find_rust_of_root && return 0
    [ "$tools_user_builds" = yes ] || return 1
    # Root may have one that the user cannot reach.
    tools_user_builds=no
    tools_find_rust_of_root && return 0
    tools_user_builds=yes
    return 1
}

tools_find_rust_of_root() {
    # Debian's last: an older one may be before it on PATH.
    for tools_dir in "$tools_on_path" "${HOME:-/root}/.cargo/bin" /usr/bin; do
        tools_try_rust env "$tools_dir" && return 0
    done
    return 1
}

# Runs apt-get; shows what it said only if it fails.
tools_apt() {
    # Debian's own timers may be at work: wait for the lock.
    if ! tools_apt_said=$(DEBIAN_FRONTEND=noninteractive apt-get -q -y \
        -o DPkg::Lock::Timeout=300 "$@" 2>&1 </dev/null); then
        # apt-get marks its reasons; without any, the end must do.
        echo "$tools_apt_said" | grep '^[EW]:' >&2 ||
            echo "$tools_apt_said" | tail -n 15 >&2
        return 1
    fi
}

# Reads the package lists, once.
tools_lists_read=
tools_read_lists() {
    [ -z "$tools_lists_read" ] || return 0
    tools_lists_read=yes
    tools_wanted=${tools_missing:- Rust $(tools_rust_wanted) or newer}
    tools_has apt-get || tools_die "missing:$tools_wanted. This script can" \
        "install that on Debian only; install it and start again"
    [ "$(id -u)" = 0 ] || tools_die "missing:$tools_wanted. Start again as root to install it"
    # One broken source among several need not stop anything: what matters is
    # whether the packages can be had.
    tools_apt update || tools_say "apt-get update failed; going on with the lists that are there"
}

# Notes Debian's packages of Rust as missing: those for web browsers are kept
# new in a stable Debian, the plain ones are of its release date.
tools_need_debian_rust() {
    tools_read_lists
    for tools_suffix in -web ''; do
        tools_version=$(tools_candidate "rustc$tools_suffix")
        if [ -n "$tools_version" ] && tools_rust_suffices "$tools_version"; then
            tools_miss "rustc$tools_suffix"
            tools_miss "cargo$tools_suffix"
            return 0
        fi
    done
    tools_die "no Rust $(tools_rust_wanted) or newer here" \
        "${tools_rust_refused:+(found: $tools_rust_refused) }nor in this Debian's packages;" \
        "install one with rustup and start again"
}

# Puts a static busybox into the target directory without installing it: the
# package would replace the busybox that Debian put on the machine.
tools_unpack_busybox() {
    tools_read_lists
    # Made by the builder, who writes to the target directory later.
    as_builder mkdir -p "$tools_checkout/target/tools"
    tools_say "unpacking a static busybox into target/tools"
    # A directory for the package alone, so that its name need not be known.
    tools_spare=$tools_checkout/target/tools/busybox-static
    rm -rf "$tools_spare"
    mkdir "$tools_spare"
    if ! (cd "$tools_spare" && tools_apt -o APT::Sandbox::User=root download busybox-static) ||
        ! dpkg-deb -x "$tools_spare"/*.deb "$tools_spare" ||
        ! mv "$tools_spare/bin/busybox" "$BUSYBOX"; then
        rm -rf "$tools_spare"
        tools_die "no static busybox: see above; name one in BUSYBOX and start again"
    fi
    rm -rf "$tools_spare"
}

# Unpacks the kernel for virtual machines into the target directory: installed,
# the package would make it the one that this machine boots next.
tools_unpack_kernel() {
    tools_kernel=$tools_checkout/target/tools/kernel
    [ ! -d "$tools_kernel" ] || return 0
    tools_read_lists
    # linux-image-cloud-amd64 has no files but depends on the latest that has.
    tools_package=$(LC_ALL=C apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    tools_say "unpacking ${tools_package:=linux-image-cloud-amd64} into target/tools"
    as_builder mkdir -p "$tools_checkout/target/tools"
    tools_spare=$tools_kernel.new
    rm -rf "$tools_spare"
    mkdir "$tools_spare"
    if ! (cd "$tools_spare" && tools_apt -o APT::Sandbox::User=root download "$tools_package") ||
        ! dpkg-deb -x "$tools_spare"/*.deb "$tools_spare" ||
        ! rm "$tools_spare"/*.deb ||
        ! mv "$tools_spare" "$tools_kernel"; then
        rm -rf "$tools_spare"
        tools_die "no kernel for the virtual machines: see above"
    fi
}

# rustfmt and clippy for the Rust in use.
tools_need_lints() {
    tools_lints=
    as_builder cargo fmt --version >/dev/null 2>&1 || tools_lints=rustfmt
    as_builder cargo clippy --version >/dev/null 2>&1 || tools_lints="${tools_lints:+$tools_lints }clippy"
    [ -n "$tools_lints" ] || return 0
    if [ "$tools_sysroot" = /usr ]; then
        tools_suffix=
        ! tools_installed rustc-web || tools_suffix=-web
        for tools_lint in $tools_lints; do
            case $tools_lint in
            rustfmt) tools_miss "rustfmt$tools_suffix" ;;
            clippy) tools_miss "rust$tools_suffix-clippy" ;;
            esac
        done
    else
        tools_say "adding $tools_lints to the Rust in $tools_rust_dir"
        # $tools_lints is a list of words.
        # shellcheck disable=SC2086
        as_builder env PATH="$tools_rust_dir:$PATH" rustup component add $tools_lints >/dev/null 2>&1 ||
            tools_die "the Rust in $tools_rust_dir lacks $tools_lints; add them with" \
                "'rustup component add' and start again"
    fi
}

install_tools() {
    case ${1-} in
    run | demo | bench | dist | test) ;;
    *) tools_die "usage: install-tools.sh run|demo|bench|dist|test" ;;
    esac
    tools_missing=
    tools_find_user

    # run: a containerd, an image, two volumes.
    tools_need containerd containerd
    tools_need ctr containerd
    tools_need containerd-shim-runc-v2 containerd
    tools_need runc runc
    tools_need mkfs.ext4 e2fsprogs
    tools_need mount mount
    tools_need losetup mount
    tools_need unshare util-linux
    tools_need setsid util-linux
    tools_need setpriv util-linux
    : "${BUSYBOX:=busybox}"
    if ! tools_static "$BUSYBOX"; then
        BUSYBOX=$tools_checkout/target/tools/busybox
        if ! tools_static "$BUSYBOX" && ! tools_installed busybox; then
            tools_miss busybox-static
        fi
    fi

    # demo: compilers for the daemon, and for gRPC and SQLite within it.
    if [ "$1" != run ]; then
        tools_need cc gcc
        tools_need c++ g++
        tools_need_path /usr/include/stdio.h libc6-dev
        tools_need cmake cmake
        tools_need make make
        tools_need pkg-config pkg-config
        # cargo fetches crates over TLS.
        tools_need_path /etc/ssl/certs/ca-certificates.crt ca-certificates
        tools_find_rust || tools_need_debian_rust
    fi

    # bench: Go programs against containerd's packages.
    if [ "$1" = bench ] || [ "$1" = dist ] || [ "$1" = test ]; then
        tools_need go golang-go
        tools_need_path /usr/share/gocode/src/github.com/containerd/containerd/snapshots/testsuite \
            golang-github-containerd-containerd-dev
    fi

    # dist: what packages and checks; tests/dist/cross.sh brings the compilers.
    if [ "$1" = dist ] || [ "$1" = test ]; then
        tools_installed python3-venv || tools_miss python3-venv
        tools_need curl curl
        tools_need lowdown lowdown
        tools_need groff groff-base
        tools_need qemu-aarch64-static qemu-user-static
        tools_need readelf binutils
        tools_need setcap libcap2-bin
        tools_need setfattr attr
        tools_need systemd-analyze systemd
    fi

    if [ "$1" = test ]; then
        tools_need shellcheck shellcheck
        tools_need strace strace
        tools_need getfattr attr
        tools_need jq jq
        tools_need shellcheck shellcheck
        tools_need pgrep procps
        tools_need nsenter util-linux
        tools_need qemu-system-x86_64 qemu-system-x86
        tools_need strip binutils
        tools_need dmsetup dmsetup
        tools_need e2fsck e2fsprogs
        tools_need debugfs e2fsprogs
        tools_need mmdebstrap mmdebstrap
        tools_need mkfs.xfs xfsprogs
        [ -z "$tools_rust_version" ] || tools_need_lints
    fi

    tools_install_missing
    if [ "$1" != run ] && [ -z "$tools_rust_version" ]; then
        tools_find_rust ||
            tools_die "Debian's Rust was installed but does not start; see 'rustc --version'"
        if [ "$1" = test ]; then
            tools_need_lints
            tools_install_missing
        fi
    fi
    if ! tools_static "$BUSYBOX"; then
        # Installed just now, or to be unpacked beside the machine's own.
        if tools_static busybox; then
            BUSYBOX=busybox
        else
            tools_unpack_busybox
        fi
    fi
    [ "$1" != test ] || tools_unpack_kernel
    BUSYBOX=$(command -v "$BUSYBOX")
    export PATH BUSYBOX

    tools_say "containerd $(tools_version containerd), runc $(tools_version runc)"
    if [ "$1" != run ]; then
        tools_say "Rust $tools_rust_version in $(dirname "$(command -v cargo)")," \
            "builds as $(as_builder id -un)"
    fi
}

# containerd says: containerd PACKAGE VERSION REVISION; runc says: runc version
# VERSION and more lines.
tools_version() {
    "$1" --version 2>/dev/null | sed -n '1s/^[^ ]* [^ ]* \([^ ]*\).*/\1/p'
}

tools_install_missing() {
    [ -n "$tools_missing" ] || return 0
    tools_read_lists
    tools_say "installing:$tools_missing"
    # --no-remove: the user's own packages stay. $tools_missing is a list.
    # shellcheck disable=SC2086
    if ! tools_apt install --no-install-recommends --no-remove $tools_missing; then
        # Debian's two Rusts exclude each other.
        case "$tools_missing $tools_rust_refused" in
        *rustc*' in /usr/bin'*)
            tools_die "the Rust in /usr/bin is too old and in the way of a newer one:" \
                "remove it with 'apt-get remove rustc cargo', or install one with rustup"
            ;;
        esac
        tools_die "could not install:$tools_missing (see above); install them and start again"
    fi
    tools_missing=
    # Forget where commands were not.
    hash -r
}

# Read by another script, this file only defines.
case ${0##*/} in
install-tools.sh) install_tools "$@" ;;
esac
