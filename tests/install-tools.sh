#!/bin/sh
# Installs what a script of the tests needs on a Debian 12 machine and does not have
# yet.
#
#     sudo sh tests/install-tools.sh run     to run the daemon with a containerd
#     sudo sh tests/install-tools.sh demo    the same, and to build the daemon
#     sudo sh tests/install-tools.sh bench   the same, and to measure it
#     sudo sh tests/install-tools.sh test    the same, for tests/run.sh
#     sudo sh tests/install-tools.sh dist    as for bench, and to make releases
#     sudo sh tests/install-tools.sh all     all of these, for tests/run.sh --all
#
# A script can also read this file with `.` and call `install_tools demo`. It then has
# what is in lib.sh, and
#
#   PATH                 with cargo, rustc and the system's sbin directories
#   BUSYBOX              a statically linked busybox
#   as_builder COMMAND   runs COMMAND (cargo, mostly) as the user who owns the
#                        checkout, if that user called sudo, so that root leaves
#                        nothing in the target directory or in ~/.cargo; otherwise as
#                        root
#
# Rust is the one on PATH, or in the ~/.cargo/bin of the user who builds, if it is new
# enough; otherwise Debian's packages for it.

set -eu

# Scripts that read this file are in the checkout, or have set `checkout`.
case ${0##*/} in
install-tools.sh) checkout=$(cd "$(dirname "$0")/.." && pwd) ;;
*) : "${checkout:=$PWD}" ;;
esac
# shellcheck source=tests/lib.sh
. "$checkout/tests/lib.sh"

# After `su` without `-`, these directories are not on PATH, and mkfs.ext4 and
# runc are not found.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH

# What each purpose needs, as COMMAND:PACKAGE, FILE:PACKAGE or PACKAGE. A package is
# not installed if its command is there: the command may come from elsewhere, and
# Debian's package could conflict with it.
tools_for() {
    case $1 in
    run)
        echo containerd:containerd containerd-shim-runc-v2:containerd ctr:containerd runc:runc \
            mkfs.ext4:e2fsprogs mount:mount losetup:mount setpriv:util-linux
        ;;
    demo)
        # Compilers for the daemon, and for the C and C++ in it: gRPC and SQLite.
        tools_for run
        echo cc:gcc c++:g++ /usr/include/stdio.h:libc6-dev make:make cmake:cmake \
            ccache:ccache pkg-config:pkg-config \
            /etc/ssl/certs/ca-certificates.crt:ca-certificates
        ;;
    bench)
        # Go programs that use containerd's packages.
        tools_for demo
        echo go:golang-go \
            /usr/share/gocode/src/github.com/containerd/containerd/snapshots/testsuite:golang-github-containerd-containerd-dev
        ;;
    test)
        tools_for bench
        # The rest is for tests/packaging/test-devices.sh.
        echo shellcheck:shellcheck mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs \
            mkfs.vfat:dosfstools mkfs.exfat:exfatprogs mkntfs:ntfs-3g mkfs.f2fs:f2fs-tools \
            mkfs.reiserfs:reiserfsprogs mksquashfs:squashfs-tools sfdisk:fdisk \
            cryptsetup:cryptsetup-bin pvcreate:lvm2 make-bcache:bcache-tools
        ;;
    dist)
        # packaging/cross.sh installs the compilers.
        tools_for bench
        echo git:git curl:curl python3-venv lowdown:lowdown groff:groff-base \
            qemu-aarch64-static:qemu-user-static readelf:binutils setcap:libcap2-bin \
            setfattr:attr systemd-analyze:systemd pgrep:procps
        ;;
    all)
        tools_for test
        tools_for dist
        echo qemu-system-x86_64:qemu-system-x86 strip:binutils dmsetup:dmsetup \
            debugfs:e2fsprogs mmdebstrap:mmdebstrap bindfs:bindfs setfacl:acl
        ;;
    esac
}

install_tools() {
    [ -n "$(tools_for "${1-}")" ] || die "usage: install-tools.sh run|demo|bench|test|dist|all"
    find_builder
    missing=
    for tool in $(tools_for "$1"); do
        is_installed "$tool" || missing="$missing ${tool#*:}"
    done
    [ "$1" = run ] || find_rust || missing="$missing rustc-web cargo-web"
    install_missing
    say "$(containerd --version), $(runc --version | head -n 1)"
    if [ "$1" != run ]; then
        find_rust || die "no Rust 1.$rust_wanted or newer here, nor in this Debian's packages;" \
            "install one with rustup and start again"
        say "Rust $tools_rust_version in $tools_rust_dir, builds as $(as_builder id -un)"
    fi
    case $1 in
    test | all) add_lints ;;
    esac
    find_busybox
    if [ "$1" = all ]; then
        unpack_kernel
        unpack_uml
    fi
}

#
# Packages.
#

# is_installed TOOL: returns whether a tool, as tools_for names it, is there.
is_installed() {
    case $1 in
    /*:*) [ -e "${1%%:*}" ] ;;
    *:*) command -v "${1%%:*}" >/dev/null ;;
    *) [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ] ;;
    esac
}

# Runs apt-get, and shows its output only if it fails.
apt_get() {
    # Debian's own timers may be running, so this waits for the lock.
    if ! apt_said=$(DEBIAN_FRONTEND=noninteractive apt-get -q -y \
        -o DPkg::Lock::Timeout=300 "$@" 2>&1 </dev/null); then
        # apt-get marks its reasons. If there are none, the end of the output is
        # shown.
        echo "$apt_said" | grep '^[EW]:' >&2 || echo "$apt_said" | tail -n 15 >&2
        return 1
    fi
}

# Reads the package lists, once, before the packages in $missing are fetched.
lists_read=no
read_lists() {
    [ "$lists_read" = no ] || return 0
    lists_read=yes
    command -v apt-get >/dev/null || die "missing: $missing. This script can install that on" \
        "Debian only; install it and start again"
    [ "$(id -u)" = 0 ] || die "missing: $missing. Start again as root to install it"
    # One broken source among several is no failure, as long as the packages can
    # be installed.
    apt_get update || say "apt-get update failed; going on with the lists that are there"
}

# Installs the packages in $missing.
install_missing() {
    [ -n "$missing" ] || return 0
    missing=$(echo "$missing" | tr ' ' '\n' | sort -u | xargs)
    read_lists
    say "installing: $missing"
    # --no-remove: the user's own packages stay.
    # shellcheck disable=SC2086
    apt_get install --no-install-recommends --no-remove $missing ||
        die "could not install $missing (see above);" \
            "install what can take their place, and start again"
    # The shell forgets where commands were missing.
    hash -r
}

# unpack PACKAGE NAME: unpacks a package into target/tools/NAME without installing it.
unpack() {
    missing=$1
    read_lists
    say "unpacking $1 into target/tools"
    # All files belong to the builder, who may remove the target directory.
    unpacked=$checkout/target/tools/$2
    rm -rf "$unpacked.new"
    as_builder mkdir -p "$unpacked.new"
    (cd "$unpacked.new" && apt_get -o APT::Sandbox::User=root download "$1" &&
        as_builder dpkg-deb -x ./*.deb . && rm ./*.deb && mv "$unpacked.new" "$unpacked") ||
        die "$1 could not be unpacked: see above"
}

# is_static PROGRAM: returns whether a program needs no libraries. A container has none
# of the host's. ldd fails for such a program.
is_static() {
    command -v "$1" >/dev/null && ! ldd "$(command -v "$1")" >/dev/null 2>&1
}

# Sets BUSYBOX. The package is not installed, because it would replace the busybox that
# the machine has.
find_busybox() {
    for BUSYBOX in "${BUSYBOX:-busybox}" "$checkout/target/tools/busybox-static/bin/busybox"; do
        ! is_static "$BUSYBOX" || break
    done
    is_static "$BUSYBOX" || unpack busybox-static busybox-static
    BUSYBOX=$(command -v "$BUSYBOX")
    export BUSYBOX
}

# Unpacks a kernel for virtual machines. An installed one would be the kernel that this
# machine boots next.
unpack_kernel() {
    [ ! -d "$checkout/target/tools/kernel" ] || return 0
    missing=linux-image-cloud-amd64
    read_lists
    # This package has no files, but depends on the latest one that has.
    unpack "$(LC_ALL=C apt-cache depends "$missing" |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)" kernel
}

# Unpacks a kernel that runs as a process, if there is one for this machine.
unpack_uml() {
    [ ! -d "$checkout/target/tools/uml" ] || return 0
    missing=user-mode-linux
    read_lists
    say "unpacking user-mode Linux into target/tools"
    as_builder mkdir -p "$checkout/target/tools"
    sh "$checkout/tests/uml.sh" ||
        say "no user-mode Linux: virtual machines are emulated, which takes longer"
}

#
# The user who builds, and the Rust of that user.
#

# Sets builder, for as_builder: the user who called sudo builds if the checkout, and what
# was built in it before, belongs to that user.
find_builder() {
    builder=
    builder_home=${HOME:-/root}
    [ "$(id -u)" = 0 ] || return 0
    for path in "$checkout" "$checkout/target"; do
        [ ! -e "$path" ] || [ "$(stat -c %U "$path")" = "${SUDO_USER:-root}" ] || return 0
    done
    [ "${SUDO_USER:-root}" != root ] || return 0
    builder_home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    # With --init-groups and HOME, the user's programs find the same files as when
    # the user runs them.
    builder="setpriv --reuid=$SUDO_USER --regid=$(id -g "$SUDO_USER") --init-groups \
        env HOME=$builder_home USER=$SUDO_USER LOGNAME=$SUDO_USER"
}

as_builder() {
    $builder "$@"
}

# Finds a Rust that is new enough for this crate, and puts it first on PATH. Debian's
# Rust is tried last, in case that an older one precedes it on PATH.
find_rust() {
    rust_wanted=$(sed -n 's/^rust-version *= *"1\.\([0-9]*\).*/\1/p' "$checkout/Cargo.toml")
    rust_on_path=$(command -v rustc || :)
    for tools_rust_dir in "$builder_home/.cargo/bin" "${rust_on_path%/rustc}" /usr/bin; do
        tools_rust_version=$(as_builder "$tools_rust_dir/rustc" --version 2>/dev/null |
            sed 's/^rustc \([0-9.]*\).*/\1/')
        rust_minor=${tools_rust_version#1.}
        # A text that is not a number is not a version.
        if [ "${rust_minor%%.*}" -ge "$rust_wanted" ] 2>/dev/null &&
            as_builder "$tools_rust_dir/cargo" --version >/dev/null 2>&1; then
            PATH=$tools_rust_dir:$PATH
            return 0
        fi
    done
    return 1
}

# Adds rustfmt and clippy to the Rust in use.
add_lints() {
    if as_builder cargo fmt --version >/dev/null 2>&1 &&
        as_builder cargo clippy --version >/dev/null 2>&1; then
        return
    elif [ "$tools_rust_dir" = /usr/bin ]; then
        missing="rustfmt-web rust-web-clippy"
        install_missing
    else
        as_builder rustup component add rustfmt clippy >/dev/null 2>&1 ||
            die "the Rust in $tools_rust_dir lacks rustfmt or clippy; add them and start again"
    fi
}

# A script that reads this file only gets the definitions.
case ${0##*/} in
install-tools.sh) install_tools "$@" ;;
esac
