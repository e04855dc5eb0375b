#!/bin/sh
# Measures the daemon beside the snapshotter that is built into containerd, in one
# process and on the same two disks, and prints one table.
#
#     sudo sh tests/bench.sh [--quick] [--json FILE]
#
# It installs what is missing (Debian 12), builds the release, makes two ext4 disks
# out of sparse files in /var/tmp, and removes them at the end, also when it is
# interrupted. --quick makes little of everything, to see that it works.
# --json writes the figures to FILE as well. With SNAPSHOTTER=PATH it measures that
# program, and builds none.
#
# The script calls itself, with --inside, for what happens in namespaces of its own:
# with them end all processes and mounts.

set -eu

here=$(cd "$(dirname "$0")" && pwd)
checkout=${here%/*}

die() {
    echo "bench: $*" >&2
    exit 1
}

trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# --inside WORK SNAPSHOTTER ARGUMENT...: as process 1 of its own process and mount
# namespaces.
inside() {
    work=$1 snapshotter=$2
    shift 2
    for disk in image writable; do
        truncate -s 24G "$work/$disk.ext4"
        # Room for the inodes of 100,000 snapshots, all of them written now: the
        # kernel would do it in the background, while something is measured.
        mkfs.ext4 -q -F -m 0 -i 8192 -E lazy_itable_init=0,lazy_journal_init=0 \
            "$work/$disk.ext4"
        mkdir "$work/$disk"
        mount -o loop,noatime "$work/$disk.ext4" "$work/$disk"
    done
    "$work/compare" -image "$work/image" -writable "$work/writable" \
        -daemon "$snapshotter" "$@"
}

job=
work=
clean_up() {
    trap '' HUP INT TERM
    if [ -n "$job" ]; then
        kill -TERM "$job" 2>/dev/null || :
        wait "$job" || :
    fi
    [ -n "$work" ] || return 0
    # The kernel lets go of a loop device a little after its last mount.
    for file in "$work"/*.ext4; do
        [ -e "$file" ] || continue
        tries=50
        while [ -n "$(losetup -j "$file")" ] && [ "$tries" -gt 0 ]; do
            sleep 0.1
            tries=$((tries - 1))
        done
    done
    rm -rf --one-file-system "$work"
}

bench() {
    quick=
    json=
    while [ $# -gt 0 ]; do
        case $1 in
        --quick) quick=-quick ;;
        --json)
            [ $# -gt 1 ] || die "--json needs a file"
            json=$2
            shift
            ;;
        *) die "usage: sudo sh tests/bench.sh [--quick] [--json FILE]" ;;
        esac
        shift
    done
    [ "$(id -u)" = 0 ] || die "this must be run by root: sudo sh tests/bench.sh"
    if [ -n "$json" ]; then
        : >"$json" || die "cannot write to $json"
        json=$(realpath "$json")
    fi

    # shellcheck source=tests/install-tools.sh
    . "$here/install-tools.sh"
    install_tools bench >&2
    if [ -n "${SNAPSHOTTER-}" ]; then
        snapshotter=$(realpath "$SNAPSHOTTER")
        [ -x "$snapshotter" ] || die "SNAPSHOTTER is no program: $SNAPSHOTTER"
    else
        cd "$checkout"
        # The user's configuration may name another target directory.
        as_builder cargo build --release --locked --target-dir "$checkout/target"
        snapshotter=$checkout/target/release/overlay-read-write-splitting-snapshotter
    fi

    trap clean_up EXIT
    # Not in memory, as /tmp may be.
    work=$(mktemp -d /var/tmp/bench.XXXXXX)
    mkdir -p "$work/go/src"
    ln -s "$here/compare" "$work/go/src/compare"
    (cd "$work/go/src/compare" &&
        GO111MODULE=off GOFLAGS='' GOPATH="$work/go:/usr/share/gocode" \
            go build -o "$work/compare" .)

    # --kill-child: if unshare is killed, all in the namespaces is.
    # $quick is one word or none.
    # shellcheck disable=SC2086
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        sh "$here/bench.sh" --inside "$work" "$snapshotter" $quick ${json:+-json "$json"} \
        </dev/null &
    job=$!
    status=0
    wait "$job" || status=$?
    job=
    return "$status"
}

case ${1-} in
--inside)
    shift
    inside "$@"
    ;;
*) bench "$@" ;;
esac
