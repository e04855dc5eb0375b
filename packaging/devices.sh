# shellcheck shell=sh
# What is on a block device, and whether it may be used or formatted. disks.sh reads
# this file, and has die, $destdir and the settings.
#
# That a program finds nothing proves nothing: the disk may not answer, or may hold
# contents that the program does not know or cannot decide on. So a device counts as
# blank only if two programs say so and zeros are read, and it is formatted only if
# both programs agree on one of the file systems that use a single disk. Everything
# else is refused.
#
# shellcheck disable=SC2034,SC2154 # disks.sh has what seems unused or not assigned.

# The option that names the device, for messages.
flag=

# leave DEV WHY...: dies, because of what was found on DEV.
leave() {
    device=$1
    shift
    die "$flag: $device was left as it is: $*. Look with 'wipefs --no-act $device'"
}

# sys_of DEV: its directory in sysfs, which is named after its device number.
sys_of() {
    printf '/sys/dev/block/%d:%d\n' "0x$(stat -L -c %t "$1")" "0x$(stat -L -c %T "$1")"
}

# mounted_at DEV: prints the mount points of DEV, one per line. A mount of btrfs
# has a device number of its own, and names the device.
mounted_at() {
    sys=$(sys_of "$1")
    mapped=$(cat "$sys/dm/name" 2>/dev/null || :)
    awk -v number="${sys##*/}" -v node="$(readlink -f "$1")" -v mapped="/dev/mapper/$mapped" '
        {
            for (i = 7; $i != "-"; i++);
            if ($3 == number || $(i + 2) == node || $(i + 2) == mapped) print $5
        }' /proc/self/mountinfo
}

# is_set_up DEV DIR: whether an earlier run has set DEV up.
is_set_up() {
    [ "$(mounted_at "$1")" = "$2" ]
}

# check_use DEV: dies if anything uses DEV.
check_use() {
    [ -b "$1" ] || die "$flag: $1 is no block device"
    node=$(readlink -f "$1")
    sys=$(sys_of "$1")
    [ -d "$sys" ] || die "$flag: the kernel does not know $1"
    at=$(mounted_at "$1") || die "$flag: cannot read where $1 is mounted"
    [ -z "$at" ] || die "$flag: $1 is mounted at $(echo "$at" | paste -s -d ' ')"
    ! awk '{ print $1 }' /proc/swaps 2>/dev/null | grep -qxF "$node" ||
        die "$flag: $1 is used for swapping"
    for holder in "$sys"/holders/*; do
        [ ! -e "$holder" ] || die "$flag: $1 is used by ${holder##*/} (LVM, RAID or encryption)"
    done
    for partition in "$sys"/*/partition; do
        [ ! -e "$partition" ] || die "$flag: $1 has partitions; name one of them"
    done
    backed=$(losetup -j "$node") || die "$flag: losetup cannot list the loop devices on $1"
    [ -z "$backed" ] || die "$flag: $1 is used by ${backed%%:*}"
    [ "$(cat "$sys/ro")" = 0 ] || die "$flag: $1 is read-only"
    # mkfs.ext4 opens the device with O_EXCL, which the kernel refuses for a device in any
    # use, even by a mount that is not visible here. With -n, nothing is written.
    said=$(mkfs.ext4 -n -q -F "$1" 2>&1) ||
        die "$flag: $1 is in use, or too small: 'mkfs.ext4 -n $1' says: $said"
}

# is_blank DEV BYTES: whether a MiB at the beginning of DEV, one at its end, and one at
# each sixteenth in between contain only zeros. Contents that no program knows may
# still be data.
is_blank() {
    sixteenth=0
    while [ "$sixteenth" -le 16 ]; do
        status=0
        cmp -s -n 1048576 "$1" /dev/zero $((($2 - 1048576) * sixteenth / 16)) 0 || status=$?
        [ "$status" -le 1 ] || die "$flag: $1 cannot be read: see 'dmesg'"
        [ "$status" = 0 ] || return 1
        sixteenth=$((sixteenth + 1))
    done
}

# value NAME: prints the value that blkid has reported under this name.
value() {
    echo "$probed" | sed -n "s/^$1=//p"
}

# look_at DEV: finds out what DEV holds, or dies. Sets $found to the type, to "unknown",
# or to nothing if DEV is blank; $uuid; and $state, which differs for other devices and
# other contents.
look_at() {
    status=0
    probed=$(blkid -p -o export "$1" 2>&1) || status=$?
    signatures=$(wipefs --no-act --noheadings --output TYPE,OFFSET,UUID "$1" 2>&1) ||
        die "$flag: wipefs cannot look at $1: $signatures"
    types=$(echo "$signatures" | awk '!seen[$1]++ { print $1 }' | paste -s -d ' ')
    found=$(value TYPE)
    uuid=$(value UUID)
    table=$(value PTTYPE)
    case $status in
    # 2 means that nothing was found, or that the device cannot be read. For a
    # partition, blkid always finds its place in the table, and ends with 0.
    0 | 2) ;;
    8)
        leave "$1" "it holds more than one thing ($types); 'wipefs --all --types TYPE $1' takes" \
            "away one that is only left over"
        ;;
    *) die "$flag: blkid cannot look at $1 (it ended with status $status): $probed" ;;
    esac
    [ "$status" = 0 ] || [ -z "$probed" ] || die "$flag: blkid cannot look at $1: $probed"
    [ -z "$table" ] ||
        leave "$1" "it has a partition table ($table${found:+ and $found}); name a partition, or" \
            "take the table away with 'wipefs --all $1' and give --format"
    [ "$found" = "$types" ] ||
        leave "$1" "blkid finds ${found:-nothing}, and wipefs finds ${types:-nothing}"
    if [ -z "$found" ] && ! is_blank "$1" "$(blockdev --getsize64 "$1")"; then
        found=unknown
        # util-linux before 2.39 does not know bcachefs.
        [ "$(od -A n -t x8 -j 4120 -N 8 "$1" | tr -d ' ')" != ca451a4ef67385c6 ] || found=bcachefs
    fi
    identity=$(lsblk --inverse --noheadings --bytes --output MAJ:MIN,SIZE,SERIAL,WWN "$1")
    [ -n "$identity" ] || die "$flag: lsblk cannot look at $1"
    sys=$(sys_of "$1")
    # A partition has its disk's number. Linux before 5.15 has none.
    sequence=$(cat "$sys/diskseq" "$sys/../diskseq" 2>/dev/null || :)
    state="$identity $sequence $found
$probed
$signatures"
}

# check_content DEV: dies unless what DEV holds may be used, or may be lost.
check_content() {
    look_at "$1"
    unwanted="if nothing needs that any more, 'wipefs --all $1' takes it away; give --format then"
    case $found in
    '' | unknown | ext[234] | xfs | btrfs | vfat | f2fs) ;;
    *) leave "$1" "it belongs to something else ($found); $unwanted" ;;
    esac
    case $what:$found in
    empty: | keep:ext4 | keep:xfs | keep:btrfs) ;;
    empty:unknown)
        leave "$1" "it holds data of an unknown kind ('od -c $1 | less' shows it); give" \
            "--format to lose it"
        ;;
    empty:*)
        leave "$1" "it has a file system ($found): give --format to lose it, or --keep to use it"
        ;;
    keep:*)
        leave "$1" "it has no file system to keep (${found:-none}), which is ext4, xfs or btrfs"
        ;;
    format:btrfs)
        # num_devices in its superblock.
        [ "$(od -A n -t u8 -j 65672 -N 8 "$1" | tr -d ' ')" = 1 ] ||
            leave "$1" "it belongs to a btrfs of several devices; $unwanted"
        ;;
    esac
}

# check_device FLAG DEV DIR: dies unless DEV may be used, and mounted on DIR. Sets $state
# for set_up.
check_device() {
    flag=$1
    state=
    [ ! -b "$2" ] || ! is_set_up "$2" "$3" || return 0
    check_use "$2"
    check_content "$2"
    check_entries "$3" "$2"
    check_hidden "$3" "$2"
}

# ask FLAG DEV: asks before DEV is formatted. Sets $state to the state that the answer
# is for.
ask() {
    flag=$1
    look_at "$2"
    case $found in
    '') content="no data, but zeros wherever it was read" ;;
    unknown) content="data of an unknown kind" ;;
    *) content="a file system: $found" ;;
    esac
    printf '%s holds %s. All its %s bytes will be lost. Type its name to format it: ' \
        "$2" "$content" "$(blockdev --getsize64 "$2")"
    answer=
    read -r answer || :
    [ "$answer" = "$2" ] || die "that is not $2: no disk was formatted"
}

# format DEV LABEL. With -m 0, the file system reserves nothing for root:
# containers write as root, so a reserve would protect nothing.
format() {
    # mkfs.ext4 leaves signatures of other file systems in places where it does
    # not write.
    [ -z "$found" ] || wipefs --all --quiet "$1" || die "$flag: wipefs failed on $1"
    mkfs.ext4 -q -F -m 0 -L "$2" "$1" || die "$flag: mkfs.ext4 failed on $1"
    # After this, the links by UUID exist before the mount looks for them.
    ! command -v udevadm >/dev/null 2>&1 || udevadm settle --timeout=10 || :
    look_at "$1"
    [ "$found" = ext4 ] || die "$flag: mkfs.ext4 has made '$found' on $1"
}
