#!/bin/sh
# Tests disks.sh in the sandbox, with loop devices for the volumes of a NAS:
# what it refuses, asks and writes, and under OpenRC also that the daemon then
# writes to the second disk. The contents of disks are tested in
# test-devices.sh.
#
#     sandbox.sh test-disks.sh
set -eu

program=overlay-read-write-splitting-snapshotter
root=/var/lib/containerd/tech.imvictor.containerd.$program
name=var-lib-containerd-tech.imvictor.containerd.overlay\\x2dread\\x2dwrite\\x2dsplitting\\x2dsnapshotter
disks=/sandbox/packaging/disks.sh
loops=

fail() {
    echo "test-disks.sh: $*" >&2
    exit 1
}

clean_up() {
    cd /
    umount -l "$root/writable" "$root" /tmp/other 2>/dev/null || :
    for loop in $loops; do
        losetup -d "$loop" || :
    done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# disk NAME: makes a loop device of 64 MiB, and sets $NAME to its name.
disk() {
    truncate -s 64M "/tmp/$1"
    loop=$(losetup --find --show "/tmp/$1")
    loops="$loops $loop"
    eval "$1=$loop"
}

# blank DEV: checks that DEV contains only zeros.
blank() {
    dd if=/dev/zero of="$1" bs=1M count=64 status=none
}

# refused TEXT OPTIONS...: disks.sh fails with TEXT, and leaves the disks alone.
refused() {
    text=$1
    shift
    sums=$(cat /tmp/image /tmp/writable /tmp/third | cksum)
    ! said=$(sh $disks "$@" 2>&1 </dev/null) || fail "not refused: $*"
    case $said in
    *"$text"*) ;;
    *) fail "$*: does not say '$text', but: $said" ;;
    esac
    [ "$(cat /tmp/image /tmp/writable /tmp/third | cksum)" = "$sums" ] || fail "$*: a disk has changed"
}

disk image
disk writable
disk third
# Set by disk().
# shellcheck disable=SC2154
both="--image-device $image --writable-device $writable"

# Words and devices that do not exist.
refused "unknown option" --image "$image"
refused "is no block device" --image-device /tmp/image
refused "cannot be both" --image-device "$image" --writable-device "$image"
refused "--format goes with" --format
refused "needs a value" --image-device
refused "has to be a full path" --image-device "$image" --root-dir big
# The name was not typed. $both is a list of words, here and below.
# shellcheck disable=SC2086
refused "no disk was formatted" --service systemd $both
# Disks in use, also with --format.
mkfs.ext4 -q "$image"
refused "has a file system (ext4)" --image-device "$image"
mkdir /tmp/other
mount "$image" /tmp/other
refused "is mounted at /tmp/other" --format --image-device "$image"
umount /tmp/other
blank "$image"
blockdev --setro "$image"
refused "is read-only" --image-device "$image"
blockdev --setrw "$image"
nested=$(losetup --find --show "$image")
refused "is used by $nested" --image-device "$image"
losetup -d "$nested"
# A directory that the mount would hide.
mkdir -p "$root/snapshots"
refused "is not empty" --image-device "$image"
rmdir "$root/snapshots"
mkdir -p "$root/writable/snapshots"
for service in systemd openrc; do
    refused "is not empty" --service $service --writable-tmpfs 1G
    refused "is not empty" --service $service --image-device "$image"
done
rm -r "$root"
# An entry for a disk that is not there now.
cp /etc/fstab /tmp/fstab
echo "UUID=5c3b6f0e-0000-4000-8000-000000000000 $root/writable ext4 nofail 0 2" >>/etc/fstab
refused "mounts UUID=5c3b6f0e-" --writable-tmpfs 1G
refused "mounts UUID=5c3b6f0e-" --writable-device "$writable"
cp /tmp/fstab /etc/fstab
unit=/etc/systemd/system/$(systemd-escape --path --suffix=mount "$root")
printf '[Mount]\nWhat=/dev/disk/by-uuid/5c3b6f0e-0000\nWhere=%s\n' "$root" >"$unit"
refused "mounts /dev/disk/by-uuid/5c3b6f0e-0000" --service systemd --image-device "$image"
rm "$unit"
# Settings that exist.
mkdir -p /etc/default
echo 'OPTIONS="--reserve 1G"' >"/etc/default/$program"
refused "is set already: --reserve 1G" --service systemd --image-device "$image"
rm "/etc/default/$program"
echo "disks.sh: refusals"

#
# systemd, below DESTDIR.
#
DESTDIR=/tmp/systemd
export DESTDIR
units=$DESTDIR/etc/systemd/system

# shellcheck disable=SC2086
printf '%s\n%s\n' "$image" "$writable" | sh $disks --service systemd $both >/tmp/said ||
    fail "it does not format"
for word in "$image" "$writable"; do
    [ "$(blkid -p -s TYPE -o value "$word")" = ext4 ] || fail "$word was not formatted"
done
[ "$(grep -c . /tmp/said)" -ge 2 ] || fail "it asks nothing"
uuid=$(blkid -p -s UUID -o value "$image")
grep -qx "What=/dev/disk/by-uuid/$uuid" "$units/$name.mount" || fail "no unit for the image volume"
grep -qx "Where=$root/writable" "$units/$name-writable.mount" || fail "none for the writable one"
[ -L "$units/local-fs.target.wants/$name.mount" ] || fail "the mount is not enabled"
[ -L "$units/$name.mount.wants/$program.service" ] || fail "the mount does not start the service"
said=$(systemd-analyze verify --man=no "$units"/*.mount 2>&1) || fail "systemd-analyze: $said"
[ -z "$said" ] || fail "systemd-analyze: $said"
# These are the daemon's default directories, so no settings are written.
grep -qx 'OPTIONS=""' "$DESTDIR/etc/default/$program" 2>/dev/null ||
    [ ! -e "$DESTDIR/etc/default/$program" ] || fail "it sets $(cat "$DESTDIR/etc/default/$program")"
rm -r "$DESTDIR"

# Other directories, and file systems that are kept.
# shellcheck disable=SC2086
sh $disks --service systemd $both --keep --root-dir /mnt/big --writable-dir /mnt/fast \
    --state-dir /mnt/fast/state </dev/null >/dev/null
[ "$(blkid -p -s UUID -o value "$image")" = "$uuid" ] || fail "--keep has formatted"
grep -qx 'OPTIONS="--root-dir /mnt/big --writable-dir /mnt/fast --state-dir /mnt/fast/state"' \
    "$DESTDIR/etc/default/$program" || fail "$(cat "$DESTDIR/etc/default/$program")"
grep -qx 'RequiresMountsFor=/mnt/big /mnt/fast/state' "$units/$program.service.d/10-mounts.conf" ||
    fail "$(cat "$units/$program.service.d/10-mounts.conf")"
rm -r "$DESTDIR"

# A machine with an SD card: what containers write is in memory.
sh $disks --service systemd --writable-tmpfs 64M
grep -qx 'Options=size=64M,mode=700,nofail' "$units/$name-writable.mount" || fail "no tmpfs"
grep -qx 'OPTIONS="--writable-volatile"' "$DESTDIR/etc/default/$program" || fail "not volatile"
unset DESTDIR
echo "disks.sh: systemd"

#
# OpenRC, for real.
#
# A system with a read-only /etc may have the settings elsewhere.
mkdir /tmp/persistent
echo '# of this machine' >/tmp/persistent/fstab
ln -sf /tmp/persistent/fstab /etc/fstab
# shellcheck disable=SC2086
printf '%s\n%s\n' "$image" "$writable" | sh $disks --service openrc --format $both >/dev/null ||
    fail "it does not format what --format was given for"
for path in "$root" "$root/writable"; do
    mountpoint -q "$path" || fail "$path is not mounted"
done
grep -q '^# of this machine$' /etc/fstab || fail "fstab has lost a line"
grep -q "^UUID=.*$root/writable.ext4.noatime,nofail.0.2\$" /etc/fstab || fail "$(cat /etc/fstab)"
grep -qx 'OPTIONS="--require-mount"' "/etc/conf.d/$program" || fail "$(cat "/etc/conf.d/$program")"
[ -L /etc/fstab ] || fail "the link /etc/fstab is a file now"
[ -z "$(find /etc /tmp/persistent -name '*.new')" ] || fail "it leaves $(find /etc -name '*.new')"
cp /etc/fstab /tmp/fstab
# A second run asks nothing and changes nothing.
# shellcheck disable=SC2086
sh $disks --service openrc $both </dev/null >/dev/null || fail "it is not the same twice"
cmp -s /etc/fstab /tmp/fstab || fail "fstab has changed the second time"

tar xzf /sandbox/dist/$program-*-"$(uname -m)".tar.gz -C /tmp
sh /sandbox/tests/packaging/build-client.sh /tmp/client
: >/tmp/log
# A list of words.
# shellcheck disable=SC2046
"$(echo /tmp/$program-*/$program)" $(sed -n 's/^OPTIONS="\(.*\)"/\1/p' "/etc/conf.d/$program") >/tmp/log 2>&1 &
daemon=$!
tries=100
until grep -q ' serving on ' /tmp/log; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "the daemon does not start: $(cat /tmp/log)"
    sleep 0.1
done
/tmp/client "$root/grpc.socks" once || fail "it does not serve: $(cat /tmp/log)"
upper=$(/tmp/client "$root/grpc.socks" prepare container)
[ "$(df --output=source "$upper" | tail -n 1)" = "$writable" ] || fail "$upper is not on $writable"
kill "$daemon"
wait "$daemon" || :
echo "disks.sh: OpenRC"
