#!/bin/sh
# sandbox.sh SCRIPT [WORDS...]: runs a shell script of this directory as root in
# a throw-away copy of this machine: its files are there, and what the script
# changes is gone with it. It has mounts, processes, /run and /tmp of its own;
# devices are the machine's. dist/ and tests/ of the checkout are in /sandbox.
set -eu

cd "$(dirname "$0")/../.."

if [ "${1-}" != --inside ]; then
    scratch=$(mktemp -d)
    # All that is mounted on it goes with the namespace.
    trap 'rmdir "$scratch"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    status=0
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        sh tests/packaging/sandbox.sh --inside "$scratch" "$@" || status=$?
    exit "$status"
fi

scratch=$2
script=$3
shift 3
mount -t tmpfs -o mode=755 tmpfs "$scratch"
root=$scratch/root
mkdir "$scratch/upper" "$scratch/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"
mkdir -p "$root/sandbox/dist" "$root/var/lib/containerd"
cp -a tests packaging "$root/sandbox/"
# Not every script needs a release.
for file in dist/*.tar.gz dist/*.deb; do
    [ ! -e "$file" ] || cp "$file" "$root/sandbox/dist/"
done
# The real disk for snapshots: overlayfs takes no overlay for its upper layer.
mount -t tmpfs tmpfs "$root/var/lib/containerd"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount --bind /proc "$root/proc"
# This shell is process 1 in here: it waits for what daemons leave behind.
status=0
chroot "$root" sh "/sandbox/tests/packaging/$script" "$@" || status=$?
exit "$status"
