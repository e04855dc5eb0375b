#!/bin/sh
# Tests devices.sh in the sandbox, with a device for each kind of content of a disk:
# disks.sh formats blank ones and, with --format, those with a single file system on a
# single disk, or with data that no program recognises. It does not write to any
# other. Needs no release.
#
#     sandbox.sh test-devices.sh
set -eu

disks=/sandbox/packaging/disks.sh
export DESTDIR=/tmp/destdir
# XFS takes at least 300 MiB.
size=$((320 * 1024 * 1024))
device=
second=
# The disk that $device is a partition of.
disk=
kinds=0

fail() {
    echo "test-devices.sh: $*" >&2
    exit 1
}

drop_devices() {
    [ -z "$disk" ] || partx --delete "$disk"
    for loop in ${disk:-$device} $second; do
        losetup -d "$loop"
    done
    disk=
    device=
    second=
}
trap drop_devices EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# fresh: makes $device a blank loop device, and $second another one.
fresh() {
    drop_devices
    rm -rf /tmp/disk /tmp/second "$DESTDIR"
    truncate -s "$size" /tmp/disk /tmp/second
    device=$(losetup --find --show /tmp/disk)
    second=$(losetup --find --show /tmp/second)
}

# changes: how much was written to, and discarded from, $device since it was set
# up.
changes() {
    blockdev --flushbufs "$device"
    awk '{ print $7, $14 }' "/sys/class/block/${device##*/}/stat"
}

# refused TEXT OPTIONS...: disks.sh fails with TEXT, and does not write to
# $device.
refused() {
    text=$1
    shift
    before=$(changes)
    ! said=$(echo "$device" | sh $disks --service openrc --writable-device "$device" "$@" 2>&1) ||
        fail "$kind $*: was taken: $said"
    case $said in
    *"$text"*) ;;
    *) fail "$kind $*: does not say '$text', but: $said" ;;
    esac
    [ "$(changes)" = "$before" ] || fail "$kind $*: the device was written to"
}

# formatted CONTENT OPTIONS...: disks.sh asks, names CONTENT and what would be lost,
# and makes an ext4 file system with our label.
formatted() {
    content=$1
    shift
    before=$(changes)
    said=$(echo "$device" | sh $disks --service openrc --writable-device "$device" "$@" 2>&1) ||
        fail "$kind $*: was not formatted: $said"
    case $said in
    *"$device holds $content. All its $size bytes will be lost."*) ;;
    *) fail "$kind $*: does not say '$content', but: $said" ;;
    esac
    [ "$(changes)" != "$before" ] || fail "the kernel does not count what is written"
    [ "$(blkid -p -s LABEL -o value "$device")" = rwsplit-writable ] || fail "$kind $*: no ext4"
}

# kind NAME COMMAND...: makes a device with that content.
kind() {
    kind=$1
    shift
    kinds=$((kinds + 1))
    fresh
    "$@" >/tmp/made 2>&1 || fail "$kind cannot be made: $(cat /tmp/made)"
    blockdev --flushbufs "$device"
}

# at OFFSET OCTAL: writes bytes; a negative offset counts from the end.
at() {
    offset=$1
    [ "$offset" -ge 0 ] || offset=$((size + offset))
    # The bytes are an escaped format.
    # shellcheck disable=SC2059
    printf "$2" | dd of="$device" bs=1 seek="$offset" conv=notrunc status=none
}

# A file system that may be lost, and only with --format.
file_system() {
    kind "$@"
    refused "has a file system ($kind): give --format"
    formatted "a file system: $kind" --format
}

# The device belongs to something larger.
member() {
    kind "$@"
    refused "belongs to something else ($kind)"
    refused "belongs to something else ($kind)" --format
    refused "wipefs --no-act $device" --keep
}

# The device has two contents, or seems to have.
ambiguous() {
    text=$1
    shift
    kind "$@"
    refused "$text"
    refused "$text" --format
    refused "$text" --keep
}

#
# Contents that no command of a Debian package can make without the kernel's
# help.
#

# The uberblocks of the labels that begin at these offsets.
zfs_labels() {
    i=0
    while [ "$i" -lt 128 ]; do
        printf '\014\261\272\0\0\0\0\0\210\023\0\0\0\0\0\0\001\0\0\0\0\0\0\0\001\0\0\0\0\0\0\0'
        head -c 992 /dev/zero
        i=$((i + 1))
    done >/tmp/uberblocks
    for offset in "$@"; do
        [ "$offset" -ge 0 ] || offset=$((size + offset))
        dd if=/tmp/uberblocks of="$device" bs=128k seek=$((offset / 131072 + 1)) conv=notrunc \
            status=none
    done
}
zfs_member() {
    zfs_labels 0 262144 -524288 -262144
}
md_1_2() {
    at 4096 '\374\116\053\251\001\0\0\0'
    at 4240 '\010\0\0\0\0\0\0\0'
}
bcachefs() {
    at 4120 '\306\205\163\366\116\032\105\312\202\145\365\177\110\272\155\201'
}
vmfs() {
    at 1048576 '\015\320\001\300\003\0\0\0'
}
half_of_a_mirror() {
    mkfs.ext4 -q -F "$device"
    at -65536 '\374\116\053\251\0\0\0\0\132\0\0\0'
}

#
# Contents that commands make.
#

luks() {
    printf secret | cryptsetup luksFormat -q --type "$1" --pbkdf pbkdf2 \
        --pbkdf-force-iterations 1000 "$device" -
}
# Without a daemon that would look for its devices.
pvcreate() {
    command pvcreate --devices "$device" "$device"
}
squashfs() {
    mksquashfs /etc/default /tmp/squashfs -noappend -quiet
    dd if=/tmp/squashfs of="$device" conv=notrunc status=none
}
table() {
    printf 'label: %s\n,\n' "$1" | sfdisk --quiet --no-reread --no-tell-kernel "$device"
}
# run COMMAND...: runs it with the device, which is another one for each kind.
run() {
    program=$1
    shift
    "$program" "$@" "$device"
}
two_of_a_btrfs() {
    mkfs.btrfs -q "$second" "$device"
}
wiped() {
    mkfs.ext4 -q -F "$device"
    wipefs --quiet --all "$device"
}
encrypted_without_header() {
    head -c 65536 /dev/urandom | dd of="$device" status=none
}
# A disk that was in a pool, and was formatted later.
ext4_in_zfs_labels() {
    zfs_member
    mkfs.ext4 -q -F -E nodiscard "$device"
}
table_and_ext4() {
    mkfs.ext4 -q -F "$device"
    at 446 '\0\0\0\0\203\0\0\0\0\010\0\0\0\140\0\0'
    at 510 '\125\252'
}
swap_and_iso9660() {
    mkswap -q "$device"
    at 32768 '\001CD001\001'
}
# Its file became shorter, so the kernel reports an error for the part beyond
# the end.
unreadable() {
    truncate -s 2M /tmp/disk
}

#
# Devices that may be formatted.
#

kind blank true
refused "has no file system to keep (none)" --keep
formatted "no data, but zeros wherever it was read"
kind blank true
formatted "no data, but zeros wherever it was read" --format
for kind in wiped encrypted_without_header 'at 167772160 data'; do
    # A name, or a name with words.
    # shellcheck disable=SC2086
    kind "$kind" $kind
    refused "holds data of an unknown kind"
    refused "has no file system to keep (unknown)" --keep
    formatted "data of an unknown kind" --format
done
file_system ext2 run mkfs.ext2 -q -F
file_system ext3 run mkfs.ext3 -q -F
file_system ext4 run mkfs.ext4 -q -F
file_system xfs run mkfs.xfs -q
file_system btrfs run mkfs.btrfs -q
file_system vfat run mkfs.vfat
file_system f2fs run mkfs.f2fs -q
echo "devices.sh: file systems"

#
# Devices that may not be formatted.
#

kind btrfs two_of_a_btrfs
refused "has a file system (btrfs): give --format"
refused "belongs to a btrfs of several devices" --format
member swap run mkswap
member crypto_LUKS luks luks1
member crypto_LUKS luks luks2
member LVM2_member pvcreate
member linux_raid_member md_1_2
member isw_raid_member at -1024 'Intel Raid ISM Cfg Sig. 1.0.00'
member ddf_raid_member at -512 '\336\021\336\021'
member zfs_member zfs_member
member bcachefs bcachefs
member bcache run make-bcache -B
member VMFS_volume_member vmfs
member ceph_bluestore at 0 'bluestore block device\n'
member vdo at 0 'dmvdo001'
member BitLocker at 0 '\353\122\220-FVE-FS-\0\002'
member DM_integrity at 0 'integrt\0\001'
member jbd run mke2fs -q -F -O journal_dev
# File systems of several machines or several disks, or of a kind that disks.sh
# does not know well enough.
member ocfs2 at 8192 'OCFSV2'
member reiserfs run mkfs.reiserfs -q
member squashfs squashfs
member iso9660 at 32768 '\001CD001\001'
ambiguous "has a partition table (dos)" dos table dos
ambiguous "has a partition table (gpt)" gpt table gpt
ambiguous "has a partition table (dos and exfat)" exfat run mkfs.exfat
ambiguous "wipefs finds ntfs dos" ntfs run mkntfs -F -Q
ambiguous "more than one thing (ext4 zfs_member)" "ext4 and zfs" ext4_in_zfs_labels
ambiguous "more than one thing (" "swap and iso9660" swap_and_iso9660
ambiguous "has a partition table (dos and ext4)" "dos and ext4" table_and_ext4
ambiguous "wipefs finds linux_raid_member ext4" "RAID 1 and ext4" half_of_a_mirror
ambiguous "cannot be read" unreadable unreadable
echo "devices.sh: what belongs to something else"

#
# Devices that are in use, or that change while disks.sh waits for the answer.
#

# A mount that is not in this list of mounts.
kind "mounted elsewhere" run mkfs.ext4 -q -F
mkdir -p /tmp/elsewhere
mkfifo /tmp/mounted /tmp/done
unshare --mount sh -c \
    "mount $device /tmp/elsewhere && echo yes >/tmp/mounted && read -r _ </tmp/done" &
read -r _ </tmp/mounted
refused "is in use" --format
refused "is in use" --keep
echo yes >/tmp/done
wait $!

# changed TEXT COMMAND...: disks.sh notices what COMMAND does after the
# question.
changed() {
    text=$1
    shift
    rm -f /tmp/answer
    mkfifo /tmp/answer
    : >/tmp/said
    sh $disks --service openrc --writable-device "$device" $format </tmp/answer >/tmp/said 2>&1 &
    asked=$!
    exec 9>/tmp/answer
    tries=100
    until grep -q 'Type its name' /tmp/said; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "$kind: asks nothing: $(cat /tmp/said)"
        sleep 0.1
    done
    "$@"
    before=$(changes)
    echo "$device" >&9
    exec 9>&-
    ! wait "$asked" || fail "$kind: was formatted: $(cat /tmp/said)"
    grep -qF "$text" /tmp/said || fail "$kind: does not say '$text', but: $(cat /tmp/said)"
    [ "$(changes)" = "$before" ] || fail "$kind: the device was written to"
}
# Another blank disk of the same size, under the same name.
replaced() {
    losetup -d "$device"
    losetup "$device" /tmp/second
}
format=
kind replaced true
losetup -d "$second"
second=
changed "is another disk now" replaced
kind "made since" true
changed "has a file system (ext4)" run mkfs.ext4 -q -F
format=--format
kind "made since" run mkfs.vfat
changed "is another disk now, or holds something else" run mkfs.ext4 -q -F

#
# A partition of a disk.
#

kind "a disk with a partition" table gpt
disk=$device
partx --add "$disk"
refused "has partitions" --format
device=${disk}p1
size=$(blockdev --getsize64 "$device")
kind="a blank partition"
formatted "no data, but zeros wherever it was read"
rm -r "$DESTDIR"
kind="a partition"
refused "has a file system (ext4)"
mkswap -q "$device"
refused "belongs to something else (swap)" --format
drop_devices

[ "$kinds" -ge 40 ] || fail "there are only $kinds kinds"
echo "devices.sh: $kinds kinds of content"
