#!/bin/sh
# Boots virtual machines with a small Debian in which the archive of dist/ is
# installed, used, upgraded and removed as the README and docs say, and whose disks come
# late or not at all. What is tested in them is boot/guest.sh, how they are run
# boot/machines.sh.
#
#     sudo sh tests/boot.sh systemd|openrc
#
# Needs what `install-tools.sh test` installs, and an archive for x86-64, from
# `packaging/release.sh x86_64`. The machines' root disks are made once and kept in
# target/tools. Where a boot fails, the end of its console is shown.
set -eu

cd "$(dirname "$0")/.."
manager=${1-}
case $manager in
systemd | openrc) ;;
*)
    echo "usage: boot.sh systemd|openrc" >&2
    exit 2
    ;;
esac
program=overlay-read-write-splitting-snapshotter
# For one boot, from power on to off, emulated on a busy machine.
limit_seconds=1800

# shellcheck source=tests/install-tools.sh
. tests/install-tools.sh
install_tools test

fail() {
    echo "boot.sh: $manager: $*" >&2
    exit 1
}

scratch=$(mktemp -d /var/tmp/boot.XXXXXX)
machine=
clean_up() {
    [ -z "$machine" ] || kill -KILL "$machine" 2>/dev/null || :
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

#
# The disks.
#

kernel=$PWD/target/tools/kernel
# shellcheck source=tests/boot/machines.sh
. tests/boot/machines.sh

modules=$(echo "$kernel"/lib/modules/*)
# How a machine is run if its kernel does not matter.
fast=qemu
if [ -e target/tools/uml/linux ]; then
    fast=uml
    modules="$modules $(echo "$PWD"/target/tools/uml/modules/*)"
else
    echo "boot.sh: $manager: there is no user-mode Linux: all boots are emulated"
fi
# The root disk is made again when its inputs have changed.
made_from=$({ cat tests/boot/root.sh tests/boot/boot-test.service tests/boot/containerd.initd &&
    echo "$modules"; } | sha256sum | cut -c 1-16)
root=target/tools/boot-$manager-$made_from.ext4
if [ ! -e "$root" ]; then
    began=$(date +%s)
    rm -f target/tools/boot-"$manager"-*
    # $modules is a list of words.
    # shellcheck disable=SC2086
    sh tests/boot/root.sh "$manager" "$root.new" $modules || fail "no root disk"
    mv "$root.new" "$root"
    echo "boot.sh: $manager: root disk made in $(($(date +%s) - began)) s"
fi
cp --sparse=always "$root" "$scratch/root"
truncate -s 1G "$scratch/image" "$scratch/writable"

# The disk that the machine reads: the release as a user gets it, the next
# release for an upgrade, and an image.
archive=$(echo dist/$program-*-x86_64.tar.gz)
[ -f "$archive" ] || fail "no archive in dist; make it with: sudo sh packaging/release.sh x86_64"
mkdir -p "$scratch/test/first" "$scratch/test/next" "$scratch/next"
cp "$archive" "$scratch/test/first/"
tar xzf "$archive" -C "$scratch/next"
name=$(ls "$scratch/next")
echo 'of the next version' >>"$scratch/next/$name/CHANGELOG.md"
tar czf "$scratch/test/next/$name.tar.gz" -C "$scratch/next" "$name"
cp tests/boot/guest.sh "$scratch/test/"
sh tests/make-image.sh "$scratch/test/image.tar" docker.io/library/split-test:latest
truncate -s 64M "$scratch/test.ext4"
mkfs.ext4 -q -F -L test -d "$scratch/test" "$scratch/test.ext4"

#
# Boots.
#

# boot KIND PHASE DISKS: boots a machine of that kind (qemu, uml) with the disks in
# the list DISKS, plugs in others when it asks for them, and waits until it turns
# itself off.
boot() {
    kind=$1
    phase=$2
    disks=$3
    began=$(date +%s)
    : >"$scratch/records"
    : >"$scratch/console"
    # The limit keeps systemd on a busy machine from giving up a disk that is
    # there.
    "start_$kind" "rw console=ttyS0 quiet panic=-1 \
systemd.default_timeout_start_sec=$limit_seconds boot-test=$phase" "$disks"
    read_lines=0
    while kill -0 "$machine" 2>/dev/null; do
        follow
        ! grep -q 'You are in emergency mode' "$scratch/console" || boot_failed "it does not boot"
        [ $(($(date +%s) - began)) -lt "$limit_seconds" ] || boot_failed "it does not end"
        sleep 0.2
    done
    follow
    status=0
    wait "$machine" || status=$?
    machine=
    [ "$status" = 0 ] || boot_failed "$kind ended with status $status: $(cat "$scratch/said")"
    [ "$(tail -n 1 "$scratch/records")" = "done" ] || boot_failed "it went off before the end"
    echo "boot.sh: $manager: $phase ($kind): $(($(date +%s) - began)) s"
}

# Does what the machine has asked for since the last call.
follow() {
    # Only complete lines are read.
    lines=$(wc -l <"$scratch/records")
    while [ "$read_lines" -lt "$lines" ]; do
        read_lines=$((read_lines + 1))
        line=$(sed -n "${read_lines}p" "$scratch/records")
        case $line in
        "plug "*) "plug_$kind" "${line#plug }" ;;
        "failed: "*) boot_failed "${line#failed: }" ;;
        esac
        echo "boot.sh: $manager: $phase: $line"
    done
}

boot_failed() {
    echo "--- the end of the console:" >&2
    # Escape sequences for colours are removed.
    tail -n 150 "$scratch/console" | sed 's/\x1b\[[0-9;?]*[a-zA-Z]//g; s/\r//g' >&2
    fail "$phase: $*"
}

both="image writable"
boot "$fast" install "$both"
# With Debian's own kernel, which users have: reboot, mounts, containers and limits.
boot qemu again "$both"
case $manager in
systemd)
    boot "$fast" late image
    boot "$fast" no-writable image
    boot "$fast" no-image writable
    ;;
openrc) boot "$fast" no-disks "" ;;
esac
