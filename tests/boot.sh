#!/bin/sh
# Boots virtual machines with a small Debian in which the archive of dist/ is
# installed, used, upgraded and removed as the README and docs say, and whose disks come
# late or not at all. What is tested in them is boot/guest.sh.
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
# Of one boot, from power on to off, emulated on a busy machine.
limit_seconds=1800

# shellcheck source=tests/install-tools.sh
. tests/install-tools.sh
install_tools test

fail() {
    echo "boot.sh: $manager: $*" >&2
    exit 1
}

scratch=$(mktemp -d /var/tmp/boot.XXXXXX)
qemu=
clean_up() {
    [ -z "$qemu" ] || kill -KILL "$qemu" 2>/dev/null || :
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

#
# The disks.
#

kernel=$PWD/target/tools/kernel
# Made again when what it is made from has changed.
made_from=$({ cat tests/boot/root.sh tests/boot/boot-test.service tests/boot/containerd.initd &&
    ls "$kernel/lib/modules"; } | sha256sum | cut -c 1-16)
root=target/tools/boot-$manager-$made_from.ext4
if [ ! -e "$root" ]; then
    began=$(date +%s)
    rm -f target/tools/boot-"$manager"-*
    sh tests/boot/root.sh "$manager" "$kernel" "$root.new" || fail "no root disk"
    mv "$root.new" "$root"
    echo "boot.sh: $manager: root disk made in $(($(date +%s) - began)) s"
fi
cp --sparse=always "$root" "$scratch/root"
truncate -s 1G "$scratch/image" "$scratch/writable"

# What is read in the machine: the release as a user has it, and as the next one
# that an upgrade brings; an image.
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

# boot PHASE DISKS: turns a machine on that has the disks of the list DISKS, and
# hands it others when it asks for them, until it turns itself off.
boot() {
    phase=$1
    disks=$2
    began=$(date +%s)
    rm -f "$scratch/monitor.in" "$scratch/monitor.out"
    mkfifo "$scratch/monitor.in" "$scratch/monitor.out"
    : >"$scratch/records"
    : >"$scratch/console"
    # The disks of the volumes are there for qemu, and turned into devices as
    # they are plugged in. A machine whose test has failed is of no use any more,
    # so nothing has to be flushed.
    devices=
    for disk in $disks; do
        devices="$devices -device virtio-blk-pci,drive=$disk,serial=$disk"
    done
    # On a busy machine systemd shall not give a disk up that is there.
    parameters="root=/dev/nvme0n1 rw console=ttyS0 quiet panic=-1 mitigations=off \
systemd.default_timeout_start_sec=$limit_seconds boot-test=$phase"
    # Emulated also where there is a /dev/kvm: one that can be opened may still
    # not run a machine, as within another virtual machine. $devices is words.
    # shellcheck disable=SC2086
    qemu-system-x86_64 -nodefaults -no-user-config -display none \
        -accel tcg,thread=multi -cpu qemu64,+rdrand -smp 2 -m 1024 \
        -kernel "$kernel"/boot/vmlinuz-* \
        -append "$parameters" \
        -drive "if=none,id=root,format=raw,cache=unsafe,file=$scratch/root" \
        -device nvme,drive=root,serial=root \
        -drive "if=virtio,format=raw,readonly=on,file=$scratch/test.ext4" \
        -drive "if=none,id=image,format=raw,cache=unsafe,file=$scratch/image" \
        -drive "if=none,id=writable,format=raw,cache=unsafe,file=$scratch/writable" \
        $devices -no-reboot \
        -chardev "file,id=console,path=$scratch/console" -serial chardev:console \
        -chardev "file,id=records,path=$scratch/records" -serial chardev:records \
        -chardev "pipe,id=monitor,path=$scratch/monitor" -mon chardev=monitor,mode=readline \
        >"$scratch/qemu" 2>&1 &
    qemu=$!
    read_lines=0
    while kill -0 "$qemu" 2>/dev/null; do
        follow
        ! grep -q 'You are in emergency mode' "$scratch/console" || boot_failed "it does not boot"
        [ $(($(date +%s) - began)) -lt "$limit_seconds" ] || boot_failed "it does not end"
        sleep 0.2
    done
    follow
    status=0
    wait "$qemu" || status=$?
    qemu=
    [ "$status" = 0 ] || boot_failed "qemu ended with status $status: $(cat "$scratch/qemu")"
    [ "$(tail -n 1 "$scratch/records")" = "done" ] || boot_failed "it went off before the end"
    echo "boot.sh: $manager: $phase: $(($(date +%s) - began)) s"
}

# Does as the machine has said since the last time.
follow() {
    # Only whole lines.
    lines=$(wc -l <"$scratch/records")
    while [ "$read_lines" -lt "$lines" ]; do
        read_lines=$((read_lines + 1))
        line=$(sed -n "${read_lines}p" "$scratch/records")
        case $line in
        "plug "*)
            disk=${line#plug }
            echo "device_add virtio-blk-pci,drive=$disk,serial=$disk" >"$scratch/monitor.in"
            ;;
        "failed: "*) boot_failed "${line#failed: }" ;;
        esac
        echo "boot.sh: $manager: $phase: $line"
    done
}

boot_failed() {
    echo "--- the end of the console:" >&2
    # Without what colours it.
    tail -n 150 "$scratch/console" | sed 's/\x1b\[[0-9;?]*[a-zA-Z]//g; s/\r//g' >&2
    fail "$phase: $*"
}

both="image writable"
boot install "$both"
boot again "$both"
case $manager in
systemd)
    boot late image
    boot no-writable image
    boot no-image writable
    ;;
openrc) boot no-disks "" ;;
esac
