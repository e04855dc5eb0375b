#!/bin/sh
# Measures the daemon beside the snapshotter that is built into containerd, in one
# process and on the same two disks, and prints one table.
#
#     sudo sh tests/bench.sh [--quick | --slow] [--json FILE]
#
# It installs what is missing (Debian 12), builds the release, makes two ext4 disks
# out of sparse files in /var/tmp, and removes them at the end, even if it is
# interrupted. --quick measures little of everything, to see that it works.
# --slow measures requests, imports and containers on disks whose flush takes some
# milliseconds instead, as a flush of a user's disk does.
# --json writes the figures to FILE as well. With SNAPSHOTTER=PATH it measures that
# program, and builds none.
#
# The script calls itself, with --inside, for the part that runs in namespaces of
# its own: all its processes and mounts end with them.

set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/install-tools.sh
. "$checkout/tests/install-tools.sh"

# --inside SCRATCH SNAPSHOTTER ARGUMENT...: as process 1 of its own process and mount
# namespaces.
inside() {
    scratch=$1 snapshotter=$2
    shift 2
    # The signal came before the traps were set.
    [ ! -e "$scratch/stop" ] || exit 143
    for disk in image writable; do
        # Room for the inodes of 100,000 snapshots, all of them written now.
        # Otherwise the kernel would write them in the background during a
        # measurement.
        make_volume "$scratch/$disk" 24G \
            -m 0 -i 8192 -E lazy_itable_init=0,lazy_journal_init=0
    done
    "$scratch/compare" -image "$scratch/image" -writable "$scratch/writable" \
        -daemon "$snapshotter" "$@"
}

bench() {
    quick=
    slow=
    json=
    while [ $# -gt 0 ]; do
        case $1 in
        --quick) quick=-quick ;;
        --slow) slow=yes ;;
        --json)
            [ $# -gt 1 ] || die "--json needs a file"
            json=$2
            shift
            ;;
        *) die "usage: sudo sh tests/bench.sh [--quick | --slow] [--json FILE]" ;;
        esac
        shift
    done
    [ "$(id -u)" = 0 ] || die "this must be run by root: sudo sh tests/bench.sh"
    if [ -n "$json" ]; then
        : >"$json" || die "cannot write to $json"
        json=$(realpath "$json")
    fi

    # Standard output is only for the table.
    install_tools bench >&2
    make_scratch
    if [ -n "${SNAPSHOTTER-}" ]; then
        snapshotter=$(realpath "$SNAPSHOTTER")
        [ -x "$snapshotter" ] || die "SNAPSHOTTER is no program: $SNAPSHOTTER"
    else
        cd "$checkout"
        # The user's configuration of cargo may name another target directory.
        build_with_progress cargo build --release --locked --target-dir "$checkout/target" >&2
        snapshotter=$checkout/target/release/overlay-read-write-splitting-snapshotter
    fi

    mkdir -p "$scratch/go/src"
    ln -s "$checkout/tests/compare" "$scratch/go/src/compare"
    (cd "$scratch/go/src/compare" &&
        GO111MODULE=off GOFLAGS='' GOPATH="$scratch/go:/usr/share/gocode" \
            go build -o "$scratch/compare" .)

    if [ -n "$slow" ]; then
        # In this process: the benchmark serves the disks itself.
        COMPARE="$scratch/compare" cargo test --quiet --release --locked \
            --target-dir "$checkout/target" --test bench -- slow
        return
    fi

    # $quick is one word or none.
    # shellcheck disable=SC2086
    run_job_in_namespaces sh "$checkout/tests/bench.sh" --inside "$scratch" "$snapshotter" \
        $quick ${json:+-json "$json"}
}

case ${1-} in
--inside)
    shift
    inside "$@"
    ;;
*) bench "$@" ;;
esac
