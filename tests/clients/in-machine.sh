#!/bin/sh
# What disks.sh starts as the first program of a machine under user-mode Linux: it has the
# files of the machine that the tests run on.
#
#     in-machine.sh SCRATCH PAIR...
set -eu

checkout=$(cd "$(dirname "$0")/../.." && pwd)
# However this ends, the machine is switched off.
trap 'echo "The machine is done, with exit code $?"; sync; echo o >/proc/sysrq-trigger; sleep 60' EXIT

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Of the files of the machine beneath, only these can be written.
mount -t hostfs none "$1" -o "$1"
for module in overlay loop f2fs fuse; do
    "$BUSYBOX" insmod "$checkout/target/tools/uml/modules/$(uname -r)"/kernel/*/*/"$module.ko"
done
sh "$checkout/tests/clients/disks.sh" --in-machine "$@"
