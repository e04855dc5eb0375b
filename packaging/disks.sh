#!/bin/sh
# Tells the service manager which disks overlay-read-write-splitting-snapshotter
# needs, and sets disks up for it. Run by root; install.sh runs it as well, with
# the options that it is given.
#
#     disks.sh                        after OPTIONS was changed by hand: writes
#                                     down which mounts the service waits for
#     disks.sh --image-device DEV     layers go to the block device DEV
#     disks.sh --writable-device DEV  what containers write goes to DEV
#     disks.sh --writable-tmpfs SIZE  or to memory (1G, 50%), lost at a reboot
#
# With further options:
#
#     --format             an ext4 file system takes the place of the one on DEV;
#                          without it, DEV has to be empty
#     --keep               the file system on DEV is taken as it is
#     --root-dir DIR       where the image device is mounted, and where the
#     --writable-dir DIR   writable one is, if not where the daemon looks by
#     --state-dir DIR      default; and where its database is
#     --service systemd|openrc
#     --check              changes nothing
#
# DEV is never a disk that is in use, and nothing is formatted before its name
# was typed. Units or fstab entries for the mounts are written and enabled.
#
# Environment: DESTDIR goes before every path that is written, for tests;
# nothing is mounted then.

set -eu

program=overlay-read-write-splitting-snapshotter
default_root=/var/lib/containerd/tech.imvictor.containerd.$program
destdir=${DESTDIR-}

say() {
    echo "disks.sh: $*"
}

die() {
    echo "disks.sh: $*" >&2
    exit 1
}

#
# The daemon's settings.
#

# option NAME: the value of --NAME in OPTIONS, given as two words or with `=`.
option() {
    awk -v name="--$1" '
        { gsub(/^[[:space:]]*OPTIONS=|"|'"'"'/, "") }
        {
            for (i = 1; i <= NF; i++) {
                if ($i == name) value = $(i + 1)
                else if (index($i, name "=") == 1) value = substr($i, length(name) + 2)
            }
        }
        END { print value }
    ' <<END
$(sed -n '/^[[:space:]]*OPTIONS=/p' "$destdir$config" 2>/dev/null | tail -n 1)
END
}

# What OPTIONS says now, or nothing.
options_now() {
    sed -n 's/^[[:space:]]*OPTIONS=//p' "$destdir$config" 2>/dev/null | tail -n 1 |
        sed -e 's/^"\(.*\)"$/\1/' -e "s/^'\(.*\)'\$/\1/"
}

# The options that the disks ask for, as one line.
options_wanted() {
    wanted=
    [ "$root" = "$default_root" ] || wanted="$wanted --root-dir $root"
    [ "$writable" = "$root/writable" ] || wanted="$wanted --writable-dir $writable"
    [ "$state" = "$root" ] || wanted="$wanted --state-dir $state"
    [ -z "$writable_tmpfs" ] || wanted="$wanted --writable-volatile"
    # systemd ties the service to the image volume's mount. OpenRC does not, and
    # the daemon would begin anew on an empty mount point.
    [ "$service" = systemd ] || [ -z "$image_device" ] || [ -z "$writable_any" ] ||
        wanted="$wanted --require-mount"
    echo "${wanted# }"
}

write_options() {
    mkdir -p "$destdir${config%/*}"
    [ -e "$destdir$config" ] || : >"$destdir$config"
    {
        # Its only line that sets OPTIONS.
        grep -v '^[[:space:]]*OPTIONS=' "$destdir$config" || :
        echo "OPTIONS=\"$1\""
    } >"$destdir$config.new"
    chmod 644 "$destdir$config.new"
    mv -f "$destdir$config.new" "$destdir$config"
}

#
# Which mounts the service waits for.
#

# mount_units DIR: the units of all mounts that DIR may be on.
mount_units() {
    directory=$1
    while [ "$directory" != / ] && [ -n "$directory" ]; do
        systemd-escape --path --suffix=mount "$directory"
        directory=${directory%/*}
    done | paste -s -d ' '
}

# A drop-in if OPTIONS moves a directory; none if not: the unit knows the
# defaults.
write_drop_in() {
    [ "$service" = systemd ] || return 0
    put_drop_in
    [ -n "$destdir" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
}

put_drop_in() {
    drop_in=/etc/systemd/system/$program.service.d/10-mounts.conf
    moved_root=$(option root-dir)
    moved_writable=$(option writable-dir)
    moved_state=$(option state-dir)
    if [ -z "$moved_root$moved_writable$moved_state" ]; then
        rm -f "$destdir$drop_in"
        rmdir "$destdir${drop_in%/*}" 2>/dev/null || :
        return 0
    fi
    moved_root=${moved_root:-$default_root}
    mkdir -p "$destdir${drop_in%/*}"
    {
        echo "# Written by disks.sh from OPTIONS in $config; it is written anew"
        echo "# whenever that runs."
        echo "[Unit]"
        [ "$moved_root" = "$default_root" ] || {
            echo "# The default's does not count any more."
            echo "RequiresMountsFor="
        }
        echo "RequiresMountsFor=$moved_root${moved_state:+ $moved_state}"
        [ -z "$moved_writable" ] || {
            echo "# Without the writable volume it serves what does not need it."
            echo "After=$(mount_units "$moved_writable")"
        }
    } >"$destdir$drop_in"
}

#
# Devices.
#

# probe DEV NAME: what blkid finds on the device itself, not in its cache.
probe() {
    blkid -p -s "$2" -o value "$1" 2>/dev/null || :
}

# mounted_at DEV: where it is mounted, a line each.
mounted_at() {
    number=$(lsblk -n -d -o MAJ:MIN "$1" | tr -d ' ')
    awk -v number="$number" '$3 == number { print $5 }' /proc/self/mountinfo
}

# A device that was set up by an earlier run.
is_set_up() {
    [ "$(mounted_at "$1")" = "$2" ]
}

# check_device FLAG DEV DIR: dies unless DEV may be used.
check_device() {
    [ -b "$2" ] || die "$1: $2 is no block device"
    ! is_set_up "$2" "$3" || return 0
    node=$(readlink -f "$2")
    name=${node##*/}
    sys=/sys/class/block/$name
    [ -d "$sys" ] || die "$1: the kernel does not know $2"
    at=$(mounted_at "$2" | paste -s -d ' ')
    [ -z "$at" ] || die "$1: $2 is mounted at $at"
    ! awk '{ print $1 }' /proc/swaps | grep -qxF "$node" || die "$1: $2 is used for swapping"
    for holder in "$sys"/holders/*; do
        [ ! -e "$holder" ] || die "$1: $2 is used by ${holder##*/} (LVM, RAID or encryption)"
    done
    for part in "$sys/$name"*; do
        [ ! -e "$part/partition" ] || die "$1: $2 has partitions (${part##*/}); name one of them"
    done
    backed=$(losetup -j "$node" 2>/dev/null | sed -n '1s/:.*//p')
    [ -z "$backed" ] || die "$1: $2 is used by $backed"
    [ "$(cat "$sys/ro")" = 0 ] || die "$1: $2 is read-only"

    type=$(probe "$2" TYPE)
    case $(probe "$2" USAGE) in
    filesystem | '') ;;
    *) die "$1: $2 belongs to something else ($type); wipe it with wipefs if it does not" ;;
    esac
    [ -z "$(probe "$2" PTTYPE)" ] || [ "$type" != '' ] ||
        die "$1: $2 has a partition table; name a partition, or wipe it with wipefs"
    case $what:$type in
    format:*) ;;
    keep:ext4 | keep:xfs | keep:btrfs) ;;
    keep:*) die "$1: $2 has no file system to keep (${type:-none}); it has to be ext4, xfs or btrfs" ;;
    empty:) ;;
    empty:*) die "$1: $2 has a file system ($type): give --format to lose it, or --keep to use it" ;;
    esac
    [ -z "$(ls -A "$destdir$3" 2>/dev/null)" ] || is_known "$3" ||
        die "$3 is not empty: what is in it would be hidden by $2; stop containerd and the" \
            "snapshotter and move it away"
}

# A mount point that has only another one's in it, or a mount of ours.
is_known() {
    [ -n "$image_device" ] && [ "$1" = "$root" ] && [ "$(ls -A "$destdir$1")" = writable ] &&
        [ -z "$(ls -A "$destdir$1/writable")" ]
}

# ask DEV: before it is formatted.
ask() {
    size=$(lsblk -n -d -b -o SIZE "$1" | awk '{ printf "%.1f GB", $1 / 1e9 }')
    type=$(probe "$1" TYPE)
    printf 'All that is on %s (%s, %s) will be lost. Type its name to format it: ' \
        "$1" "$size" "${type:-no file system}"
    answer=
    read -r answer || :
    [ "$answer" = "$1" ] || die "that is not $1: no disk was formatted"
}

# format DEV LABEL. -m 0: what a file system keeps for root would be kept from
# nobody, containers write as root.
format() {
    mkfs.ext4 -q -F -m 0 -L "$2" "$1" || die "mkfs.ext4 failed on $1"
    # So that links by UUID are there before the mount looks for them.
    ! command -v udevadm >/dev/null 2>&1 || udevadm settle --timeout=10 || :
}

#
# Mounts.
#

# add_mount WHAT DIR TYPE OPTIONS COMMENT
add_mount() {
    case $service in
    systemd) add_mount_unit "$@" ;;
    openrc) add_fstab_line "$@" ;;
    esac
}

add_mount_unit() {
    unit=$(systemd-escape --path --suffix=mount "$2")
    mkdir -p "$destdir/etc/systemd/system"
    {
        echo "# Written by disks.sh of $program."
        echo "[Unit]"
        echo "Description=$5 of $program"
        echo
        echo "[Mount]"
        echo "What=$1"
        echo "Where=$2"
        echo "Type=$3"
        # nofail: the machine boots without it.
        echo "Options=$4"
        echo
        echo "[Install]"
        echo "WantedBy=local-fs.target"
        # A disk that appears late is mounted then.
        case $1 in
        /dev/*) echo "WantedBy=$(systemd-escape --path --suffix=device "$1")" ;;
        esac
        # One in the image volume fails with it, and is mounted with it.
        case ${image_device:+$2} in
        "$root"/*) echo "WantedBy=$(systemd-escape --path --suffix=mount "$root")" ;;
        esac
    } >"$destdir/etc/systemd/system/$unit"
    systemctl ${destdir:+--root="$destdir"} --quiet enable "$unit"
    [ -n "$destdir" ] || [ ! -d /run/systemd/system ] || {
        systemctl daemon-reload
        systemctl start "$unit" || die "$2 could not be mounted: see 'systemctl status $unit'"
    }
}

# The image volume's mount starts the daemon, which gives up without it. Written
# after both volumes are mounted: a daemon that was started between the two would
# take the bare mount point for the writable volume.
start_with_image_volume() {
    [ "$service" = systemd ] || return 0
    wants=/etc/systemd/system/$(systemd-escape --path --suffix=mount "$root").wants
    mkdir -p "$destdir$wants"
    service_unit=/usr/local/lib/systemd/system/$program.service
    [ -e "$destdir$service_unit" ] || service_unit=/lib/systemd/system/$program.service
    ln -sfn "$service_unit" "$destdir$wants/$program.service"
}

add_fstab_line() {
    what_fstab=$1
    case $1 in
    /dev/disk/by-uuid/*) what_fstab=UUID=${1##*/} ;;
    esac
    pass=2
    [ "$3" = ext4 ] || pass=0
    mkdir -p "$destdir/etc" "$destdir$2"
    [ -e "$destdir/etc/fstab" ] || : >"$destdir/etc/fstab"
    {
        # In the place of what an earlier run has written.
        awk -v where="$2" '$1 ~ /^#/ || $2 != where' "$destdir/etc/fstab"
        printf '%s\t%s\t%s\t%s\t0\t%s\n' "$what_fstab" "$2" "$3" "$4" "$pass"
    } >"$destdir/etc/fstab.new"
    chmod 644 "$destdir/etc/fstab.new"
    mv -f "$destdir/etc/fstab.new" "$destdir/etc/fstab"
    [ -n "$destdir" ] || mount "$2" || die "$2 could not be mounted"
}

# set_up DEV DIR LABEL COMMENT
set_up() {
    ! is_set_up "$1" "$2" || return 0
    [ "$what" = keep ] || format "$1" "$3"
    uuid=$(probe "$1" UUID)
    [ -n "$uuid" ] || die "$1 has no UUID"
    mount_options=noatime,nofail
    # The pool of a zvol would never get back what was removed.
    case $(readlink -f "$1") in
    /dev/zd*) mount_options=$mount_options,discard ;;
    esac
    add_mount "/dev/disk/by-uuid/$uuid" "$2" "$(probe "$1" TYPE)" "$mount_options" "$4"
    say "$4: $1, mounted at $2"
}

#
# The command line.
#

image_device=
writable_device=
writable_tmpfs=
what=empty
root=
writable=
state=
service=
check_only=no

# take NAME VALUE: checks the value of an option.
take() {
    case $2 in
    '') die "$1 needs a value" ;;
    *[[:space:]]*) die "$1: '$2' has a blank" ;;
    esac
    case $1 in
    --*-dir)
        case $2 in
        *[,:\\]*) die "$1: '$2' has a comma, colon or backslash" ;;
        /*[!/]) ;;
        *) die "$1: $2 has to be a full path" ;;
        esac
        ;;
    esac
}

while [ $# -gt 0 ]; do
    name=$1
    case $1 in
    --format | --keep | --check) ;;
    --image-device | --writable-device | --writable-tmpfs | --root-dir | --writable-dir | \
        --state-dir | --service)
        take "$1" "${2-}"
        shift
        ;;
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) die "unknown option $1; --help tells which there are" ;;
    esac
    case $name in
    --format | --keep)
        [ "$what" = empty ] || die "give --format or --keep once"
        what=${name#--}
        ;;
    --check) check_only=yes ;;
    --image-device) image_device=$1 ;;
    --writable-device) writable_device=$1 ;;
    --writable-tmpfs) writable_tmpfs=$1 ;;
    --root-dir) root=$1 ;;
    --writable-dir) writable=$1 ;;
    --state-dir) state=$1 ;;
    --service) service=$1 ;;
    esac
    shift
done
[ -n "$service" ] || { [ -d /run/systemd/system ] && service=systemd || service=openrc; }
case $service in
systemd) config=/etc/default/$program ;;
openrc) config=/etc/conf.d/$program ;;
*) die "--service is '$service', it has to be systemd or openrc" ;;
esac
writable_any=$writable_device$writable_tmpfs

if [ -z "$image_device$writable_any" ]; then
    [ -z "$root$writable$state" ] ||
        die "directories without a device: set them in OPTIONS in $config"
    [ "$what" = empty ] || die "--$what goes with --image-device or --writable-device"
    [ "$check_only" = yes ] || write_drop_in
    exit 0
fi
[ -z "$writable_device" ] || [ -z "$writable_tmpfs" ] ||
    die "--writable-device and --writable-tmpfs exclude each other"
root=${root:-$default_root}
writable=${writable:-$root/writable}
state=${state:-$root}
for command in lsblk blkid awk mkfs.ext4 ${image_device:+losetup}; do
    command -v "$command" >/dev/null 2>&1 || die "$command is needed (util-linux, e2fsprogs)"
done
blkid -V 2>&1 | grep -q util-linux || die "blkid of util-linux is needed, not another one"

now=$(options_now)
wanted=$(options_wanted)
[ -z "$now" ] || [ "$now" = "$wanted" ] ||
    die "OPTIONS in $config is set already: $now; empty it first"
[ -z "$image_device" ] || check_device --image-device "$image_device" "$root"
[ -z "$writable_device" ] || check_device --writable-device "$writable_device" "$writable"
[ -z "$image_device" ] || [ -z "$writable_device" ] ||
    [ "$(readlink -f "$image_device")" != "$(readlink -f "$writable_device")" ] ||
    die "$image_device cannot be both"
[ "$check_only" = no ] || exit 0

# All questions before the first change.
if [ "$what" != keep ]; then
    [ -z "$image_device" ] || is_set_up "$image_device" "$root" || ask "$image_device"
    [ -z "$writable_device" ] || is_set_up "$writable_device" "$writable" || ask "$writable_device"
fi
[ -z "$image_device" ] || set_up "$image_device" "$root" rwsplit-image "Image volume"
[ -z "$writable_device" ] || set_up "$writable_device" "$writable" rwsplit-writable "Writable volume"
[ -z "$writable_tmpfs" ] ||
    add_mount tmpfs "$writable" tmpfs "size=$writable_tmpfs,mode=700,nofail" "Writable volume"
[ -z "$image_device" ] || start_with_image_volume
[ "$now" = "$wanted" ] || write_options "$wanted"
write_drop_in
