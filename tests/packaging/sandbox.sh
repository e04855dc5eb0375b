#!/bin/sh
# sandbox.sh SCRIPT [WORDS...]: runs a shell script of this directory as root in
# a temporary copy of this machine. The machine's files are there, and changes
# are lost at the end. The script has its own mounts, processes, /run and /tmp;
# devices are the machine's. dist/ and tests/ of the checkout are in /sandbox.
set -eu

cd "$(dirname "$0")/../.."

if [ "${1-}" != --inside ]; then
    scratch=$(mktemp -d)
    # All mounts on it end with the namespace.
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
# Some scripts need no release.
for file in dist/*.tar.gz dist/*.deb; do
    [ ! -e "$file" ] || cp "$file" "$root/sandbox/dist/"
done
# Snapshots need another file system: overlayfs does not accept an overlay as
# its upper layer.
mount -t tmpfs tmpfs "$root/var/lib/containerd"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount --bind /proc "$root/proc"
# This shell is process 1 here: it waits for processes that daemons leave
# behind.
status=0
chroot "$root" sh "/sandbox/tests/packaging/$script" "$@" || status=$?
exit "$status"
