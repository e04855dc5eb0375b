#!/bin/sh
# Configures which disks overlay-read-write-splitting-snapshotter needs, and
# sets them up. Run by root; install.sh also runs it, with its own options.
#
#     disks.sh                        after OPTIONS was changed by hand: writes
#                                     down which mounts the service waits for
#     disks.sh --image-device DEV     layers go to the block device DEV
#     disks.sh --writable-device DEV  what containers write goes to DEV
#     disks.sh --writable-tmpfs SIZE  or to memory (1G, 50%), lost at a reboot
#
# With further options:
#
#     --format             an ext4 file system takes the place of what is on DEV;
#                          without it, DEV has to be blank: zeros, as far as looked
#     --keep               the file system on DEV is taken as it is
#     --root-dir DIR       where the image device is mounted, and where the
#     --writable-dir DIR   writable one is, if not where the daemon looks by
#     --state-dir DIR      default; and where its database is
#     --service systemd|openrc
#     --check              changes nothing
#
# DEV is never a disk that is in use, or one that holds anything other than a
# single file system on a single disk: a partition table, or a part of LVM, RAID, a
# ZFS pool or encryption, is left alone even with --format. A device is formatted
# only after its name was typed. Units or fstab entries for the mounts are written
# and enabled.
#
# Environment: DESTDIR is put before every path that is written, for tests;
# nothing is mounted then.

set -eu

program=overlay-read-write-splitting-snapshotter
default_root=/var/lib/containerd/tech.imvictor.containerd.$program
destdir=${DESTDIR-}

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=packaging/devices.sh
. "$here/devices.sh"

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

# read_settings: sets $settings to the last line that sets OPTIONS. A file that
# cannot be read does not count as one without settings.
read_settings() {
    settings=
    [ -e "$destdir$config" ] || [ -L "$destdir$config" ] || return 0
    settings=$(cat "$destdir$config") || die "cannot read $config"
    settings=$(echo "$settings" | sed -n 's/^[[:space:]]*OPTIONS=//p' | tail -n 1)
}

# option NAME: the value of --NAME in OPTIONS, given as two words or with `=`.
option() {
    echo "$settings" | awk -v name="--$1" '
        { gsub(/"|'"'"'/, "") }
        {
            for (i = 1; i <= NF; i++) {
                if ($i == name) value = $(i + 1)
                else if (index($i, name "=") == 1) value = substr($i, length(name) + 2)
            }
        }
        END { print value }'
}

# Prints the present OPTIONS, or nothing.
options_now() {
    echo "$settings" | sed -e 's/^"\(.*\)"$/\1/' -e "s/^'\(.*\)'\$/\1/"
}

# Prints the options for the disks, in one line.
options_wanted() {
    wanted=
    [ "$root" = "$default_root" ] || wanted="$wanted --root-dir $root"
    [ "$writable" = "$root/writable" ] || wanted="$wanted --writable-dir $writable"
    [ "$state" = "$root" ] || wanted="$wanted --state-dir $state"
    [ -z "$writable_tmpfs" ] || wanted="$wanted --writable-volatile"
    # systemd ties the service to the image volume's mount. OpenRC does not, and
    # the daemon would start with an empty mount point, without any layers.
    [ "$service" = systemd ] || [ -z "$image_device" ] || [ -z "$writable_any" ] ||
        wanted="$wanted --require-mount"
    echo "${wanted# }"
}

write_options() {
    mkdir -p "$destdir${config%/*}"
    [ -e "$destdir$config" ] || : >"$destdir$config"
    # Replaces the line that sets OPTIONS.
    sed '/^[[:space:]]*OPTIONS=/d' "$destdir$config" >"$destdir$config.new" ||
        die "cannot read $config"
    echo "OPTIONS=\"$1\"" >>"$destdir$config.new"
    replace "$destdir$config"
    settings="\"$1\""
}

# replace PATH: puts PATH.new in its place. After a power cut, one of the two is
# there, whole.
replace() {
    chmod 644 "$1.new"
    sync "$1.new" || die "cannot write $1.new to its disk"
    mv -f "$1.new" "$1"
    sync "${1%/*}" || die "cannot write ${1%/*} to its disk"
}

#
# Which mounts the service waits for.
#

# mount_units DIR: sets $units to the units of all mounts that DIR may be on.
mount_units() {
    directory=$1
    units=
    while [ "$directory" != / ] && [ -n "$directory" ]; do
        unit=$(systemd-escape --path --suffix=mount "$directory")
        units="$units $unit"
        directory=${directory%/*}
    done
    units=${units# }
}

# Writes a drop-in if OPTIONS sets another directory, and none otherwise,
# because the unit knows the defaults.
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
    mount_units "$moved_writable"
    {
        echo "# Written by disks.sh from OPTIONS in $config; it is written again"
        echo "# whenever that runs."
        echo "[Unit]"
        [ "$moved_root" = "$default_root" ] || {
            echo "# The mount of the default directory does not count any more."
            echo "RequiresMountsFor="
        }
        echo "RequiresMountsFor=$moved_root${moved_state:+ $moved_state}"
        [ -z "$moved_writable" ] || {
            echo "# Without the writable volume, the daemon serves what does not need it."
            echo "After=$units"
        }
    } >"$destdir$drop_in.new"
    replace "$destdir$drop_in"
}

#
# Mount points.
#

# is_tmpfs DIR: whether a tmpfs is mounted there.
is_tmpfs() {
    awk -v where="$1" '
        { for (i = 7; $i != "-"; i++); }
        $5 == where { type = $(i + 1) }
        END { exit type != "tmpfs" }' /proc/self/mountinfo
}

# check_hidden DIR WHAT: dies if the mount of WHAT would hide data.
check_hidden() {
    [ -e "$destdir$1" ] || [ -L "$destdir$1" ] || return 0
    inside=$(ls -A "$destdir$1") || die "$flag: cannot read $1"
    [ -n "$inside" ] || return 0
    # A mount point inside of a mount point.
    if [ -n "$image_device" ] && [ "$1" = "$root" ] && [ "$inside" = writable ]; then
        inside=$(ls -A "$destdir$1/writable") || die "$flag: cannot read $1/writable"
        [ -n "$inside" ] || return 0
    fi
    die "$flag: $1 is not empty: what is in it would be hidden by $2; stop containerd and the" \
        "snapshotter and move it away"
}

# check_entries DIR WHAT: dies if fstab or a unit mounts another disk than WHAT there.
# That it is not mounted, and DIR is empty, does not prove that it is not needed.
check_entries() {
    entries=$(entries_of "$1") || die "$flag: cannot read what is mounted at $1 at boot"
    for entry in $entries; do
        [ "$entry" != "$2" ] || continue
        case $entry in
        "UUID=$uuid" | "/dev/disk/by-uuid/$uuid") continue ;;
        /dev/*) [ "$(readlink -f "$entry")" != "$(readlink -f "$2")" ] || continue ;;
        esac
        die "$flag: there is an entry already that mounts $entry at $1; if that disk is not" \
            "needed any more, take the entry away (/etc/fstab, or a unit in /etc/systemd/system)"
    done
}

# entries_of DIR: prints what fstab, or a unit of that name, mounts there.
entries_of() {
    [ ! -e "$destdir/etc/fstab" ] ||
        awk -v where="$1" '$1 !~ /^#/ && $2 == where { print $1 }' "$destdir/etc/fstab" ||
        return 1
    [ "$service" = systemd ] || return 0
    unit=$destdir/etc/systemd/system/$(systemd-escape --path --suffix=mount "$1")
    [ ! -e "$unit" ] || sed -n 's/^What=//p' "$unit"
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
        # With nofail, the machine boots without the disk.
        echo "Options=$4"
        echo
        echo "[Install]"
        echo "WantedBy=local-fs.target"
        # With this, a disk that appears late is mounted then.
        case $1 in
        /dev/*) echo "WantedBy=$(systemd-escape --path --suffix=device "$1")" ;;
        esac
        # A mount in the image volume fails with it, and is mounted with it.
        case ${image_device:+$2} in
        "$root"/*) echo "WantedBy=$(systemd-escape --path --suffix=mount "$root")" ;;
        esac
    } >"$destdir/etc/systemd/system/$unit.new"
    replace "$destdir/etc/systemd/system/$unit"
    systemctl ${destdir:+--root="$destdir"} --quiet enable "$unit"
    [ -n "$destdir" ] || [ ! -d /run/systemd/system ] || {
        systemctl daemon-reload
        systemctl start "$unit" || die "$2 could not be mounted: see 'systemctl status $unit'"
    }
}

# The image volume's mount starts the daemon, which gives up without it. This is
# written after both volumes are mounted: a daemon that started between the two
# mounts would use the bare mount point as the writable volume.
start_with_image_volume() {
    [ "$service" = systemd ] || return 0
    wants=/etc/systemd/system/$(systemd-escape --path --suffix=mount "$root").wants
    mkdir -p "$destdir$wants"
    for service_unit in /etc/systemd/system /usr/local/lib/systemd/system /lib/systemd/system; do
        service_unit=$service_unit/$program.service
        [ ! -f "$destdir$service_unit" ] || break
    done
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
    # The file itself, in case /etc/fstab is a link to it.
    fstab=$(readlink -f "$destdir/etc/fstab") || die "/etc/fstab leads nowhere"
    case $fstab in
    "$(readlink -f "${destdir:-/}")"*) ;;
    *) die "/etc/fstab leads out of $destdir" ;;
    esac
    [ -e "$fstab" ] || : >"$fstab"
    # Replaces the entry of an earlier run.
    awk -v where="$2" '$1 ~ /^#/ || $2 != where' "$fstab" >"$fstab.new" || die "cannot read $fstab"
    printf '%s\t%s\t%s\t%s\t0\t%s\n' "$what_fstab" "$2" "$3" "$4" "$pass" >>"$fstab.new"
    replace "$fstab"
    [ -n "$destdir" ] || is_tmpfs "$2" || mount "$2" || die "$2 could not be mounted"
}

# set_up FLAG DEV DIR STATE LABEL COMMENT. STATE is the state in which DEV was found,
# perhaps minutes ago.
set_up() {
    ! is_set_up "$2" "$3" || return 0
    check_device "$1" "$2" "$3"
    [ "$state" = "$4" ] ||
        die "$1: $2 is another disk now, or holds something else: it was left as it is"
    [ "$what" = keep ] || format "$2" "$5"
    [ -n "$uuid" ] || die "$1: $2 has no UUID"
    mount_options=noatime,nofail
    # Without discard, the pool of a zvol would never get back what was removed.
    case $(readlink -f "$2") in
    /dev/zd*) mount_options=$mount_options,discard ;;
    esac
    add_mount "/dev/disk/by-uuid/$uuid" "$3" "$found" "$mount_options" "$6"
    say "$6: $2, mounted at $3"
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
    *) die "unknown option $1; --help lists the options" ;;
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
if [ -z "$service" ]; then
    if [ -d /run/systemd/system ]; then
        service=systemd
    elif [ -x /sbin/openrc-run ] || [ -x /usr/sbin/openrc-run ]; then
        service=openrc
    elif command -v systemctl >/dev/null 2>&1; then
        service=systemd
    else
        die "neither systemd nor OpenRC runs here; choose one with --service"
    fi
fi
case $service in
systemd) config=/etc/default/$program ;;
openrc) config=/etc/conf.d/$program ;;
*) die "--service is '$service', it has to be systemd or openrc" ;;
esac
read_settings
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
for command in lsblk blkid wipefs blockdev losetup mkfs.ext4 cmp od awk; do
    command -v "$command" >/dev/null 2>&1 ||
        die "$command is needed (util-linux, e2fsprogs, diffutils, coreutils)"
done
blkid -V 2>&1 | grep -q util-linux || die "blkid of util-linux is needed, not another one"

now=$(options_now)
wanted=$(options_wanted)
[ -z "$now" ] || [ "$now" = "$wanted" ] ||
    die "OPTIONS in $config is set already: $now; empty it first"
image_state=
writable_state=
if [ -n "$image_device" ]; then
    check_device --image-device "$image_device" "$root"
    image_state=$state
fi
if [ -n "$writable_device" ]; then
    check_device --writable-device "$writable_device" "$writable"
    writable_state=$state
fi
if [ -n "$writable_tmpfs" ] && ! is_tmpfs "$writable"; then
    flag=--writable-tmpfs
    uuid=
    check_entries "$writable" tmpfs
    check_hidden "$writable" tmpfs
fi
[ -z "$image_device" ] || [ -z "$writable_device" ] ||
    [ "$(sys_of "$image_device")" != "$(sys_of "$writable_device")" ] ||
    die "$image_device cannot be both"
[ "$check_only" = no ] || exit 0

# All questions are asked before the first change.
if [ "$what" != keep ]; then
    if [ -n "$image_device" ] && ! is_set_up "$image_device" "$root"; then
        ask --image-device "$image_device"
        image_state=$state
    fi
    if [ -n "$writable_device" ] && ! is_set_up "$writable_device" "$writable"; then
        ask --writable-device "$writable_device"
        writable_state=$state
    fi
fi
[ -z "$image_device" ] ||
    set_up --image-device "$image_device" "$root" "$image_state" rwsplit-image "Image volume"
[ -z "$writable_device" ] ||
    set_up --writable-device "$writable_device" "$writable" "$writable_state" rwsplit-writable \
        "Writable volume"
[ -z "$writable_tmpfs" ] ||
    add_mount tmpfs "$writable" tmpfs "size=$writable_tmpfs,mode=700,nofail" "Writable volume"
[ -z "$image_device" ] || start_with_image_volume
[ "$now" = "$wanted" ] || write_options "$wanted"
write_drop_in
