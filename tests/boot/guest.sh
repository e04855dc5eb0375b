#!/bin/sh
# Runs in the test machine, as root, after it has booted: does what the kernel's
# parameter boot-test= names, reports about it on the second serial line, and
# turns the machine off. Lines for the host:
#
#     ok: WHAT         for people
#     plug DISK        the disk is to be plugged in (image, writable)
#     failed: WHAT     the end; the console has the logs
#     done             the end
#
# Under qemu the disks have their names as serial numbers, under user-mode Linux they
# are always the third and the fourth.
set -eu

exec </dev/null >/dev/console 2>&1
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
program=overlay-read-write-splitting-snapshotter
root=/var/lib/containerd/tech.imvictor.containerd.$program
writable=$root/writable
share=/usr/local/share/$program
if [ -e /sys/block/ubda ]; then
    disk_image=/dev/ubdc
    disk_writable=/dev/ubdd
else
    disk_image=/dev/disk/by-id/virtio-image
    disk_writable=/dev/disk/by-id/virtio-writable
fi
image=docker.io/library/split-test:latest
label_max_size=containerd.io/snapshot/overlay-read-write-splitting.max-size
# Written by the container "limited".
limited_said=/tmp/limited
phase=$(sed -n 's/.*boot-test=\([^ ]*\).*/\1/p' /proc/cmdline)
[ -d /run/systemd/system ] && manager=systemd || manager=openrc

# Lines are not changed.
stty -F /dev/ttyS1 raw -echo
report() {
    echo "$*" >/dev/ttyS1
    echo "boot-test: $*"
}

fail() {
    set +e
    echo "--- boot-test: $*"
    grep -E ' / | /test |containerd' /proc/self/mountinfo
    [ ! -e "$limited_said" ] || cat "$limited_said"
    case $manager in
    systemd)
        systemctl --no-pager --full status "$program" containerd "$(unit_of image)"
        systemctl --no-pager list-jobs
        # containerd's long list of plugins is left out.
        journalctl --no-pager -b -n 100 | grep -v 'loading plugin'
        ;;
    openrc)
        rc-status --all
        # containerd's long list of plugins is left out.
        grep -v 'loading plugin' /var/log/containerd.log | tail -n 30
        tail -n 30 "/var/log/$program.log"
        ;;
    esac
    # The host reads the console when this line arrives.
    sync
    sleep 2
    report "failed: $*"
    # The host ends the machine.
    sleep 1000
}
# For failures that end the script by `set -e`.
trap '[ $? = 0 ] || fail "a command in this test has failed, see the console"' EXIT
set -x

# wait_for WHAT COMMAND...: waits until the command succeeds.
wait_for() {
    what=$1
    shift
    tries=600
    until "$@"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "waited in vain: $what"
        sleep 0.5
    done >/dev/null 2>&1
}

#
# Services.
#

daemon_pid() {
    pgrep -x -f "/usr/local/bin/$program( .*)?"
}

# The device of a volume.
disk_of() {
    case $1 in
    image) echo "$disk_image" ;;
    writable) echo "$disk_writable" ;;
    esac
}

# The unit that disks.sh has made for a volume.
unit_of() {
    case $1 in
    image) systemd-escape --path --suffix=mount "$root" ;;
    writable) systemd-escape --path --suffix=mount "$writable" ;;
    esac
}

# listens SOCKET: whether a program listens there, according to the kernel (flag
# 10000). ctr would take seconds of an emulated processor for each call.
listens() {
    awk -v socket="$1" '$4 == "00010000" && $8 == socket { found = 1 } END { exit !found }' \
        /proc/net/unix
}

containerd_runs() {
    listens /run/containerd/containerd.sock
}

restart_containerd() {
    case $manager in
    systemd) systemctl restart containerd ;;
    openrc) rc-service containerd restart ;;
    esac
    wait_for "containerd" containerd_runs
}

# The daemon answers: containerd has received a list from it.
serves() {
    listens "$root/grpc.socks" && ctr snapshots --snapshotter rwsplit ls >/dev/null 2>&1
}

# From the next boot on, systemd waits only for this disk, and not for long.
give_up_soon() {
    rm -rf /etc/systemd/system/dev-*.device.d
    uuid=$(blkid -s UUID -o value "$(disk_of "$1")")
    drop_in=/etc/systemd/system/$(systemd-escape --path --suffix=device \
        "/dev/disk/by-uuid/$uuid").d
    mkdir "$drop_in"
    printf '[Unit]\nJobRunningTimeoutSec=15\n' >"$drop_in/timeout.conf"
}

# Everything that is started at boot has started or failed.
wait_for_boot() {
    case $manager in
    systemd) wait_for "the end of the boot" systemctl is-active multi-user.target ;;
    # OpenRC starts this script after that.
    openrc) ;;
    esac
    wait_for "containerd" containerd_runs
}

# Without a disk that it needs, the service does not serve, however long one
# waits.
is_not_served() {
    case $manager in
    systemd) ! daemon_pid || fail "the daemon runs" ;;
    openrc)
        grep -q 'is not a mount point' "/var/log/$program.log" || fail "the log does not say why"
        # It is tried every five seconds.
        for _ in 1 2 3 4 5 6 7; do
            ! serves || fail "it serves"
            sleep 1
        done
        ;;
    esac
    [ ! -e "$root/grpc.socks" ] || fail "there is a socket"
}

# The time at which a process was started, in ticks since the boot.
started() {
    sed 's/.*) //' "/proc/$1/stat" | cut -d ' ' -f 20
}

#
# Disks and containers.
#

# on DISK PATH: the path's file system is on this disk.
on() {
    source=$(df --output=source "$2" | tail -n 1)
    [ "$(readlink -f "$source")" = "$(readlink -f "$(disk_of "$1")")" ] ||
        fail "$2 is on $source, not on the $1 disk"
}

# The KiB used on the file system of a path, after a flush.
used() {
    sync -f "$1"
    df --output=used "$1" | tail -n 1
}

# mounts_of ID: $upper and $lowers, the directories of a container.
mounts_of() {
    options=$(ctr snapshots --snapshotter rwsplit mounts /nowhere "$1" | tr -s ', ' '\n')
    upper=$(echo "$options" | sed -n 's/^upperdir=//p')
    lowers=$(echo "$options" | sed -n 's/^lowerdir=//p' | tr : ' ')
    case $upper:$lowers in
    :* | *:) fail "the snapshotter does not know container $1" ;;
    esac
}

# run ID: a new container writes 4 MiB, which are then on the writable disk; its
# image is on the image disk. The container stays.
run() {
    image_before=$(used "$root")
    writable_before=$(used "$writable")
    ctr run --snapshotter rwsplit "$image" "$1" /bin/sh -c \
        "dd if=/dev/urandom of=/data bs=1M count=4 && echo $1 >/etc/motd" ||
        fail "container $1 does not run"
    mounts_of "$1"
    [ "$(stat -c %s "$upper/data")" = 4194304 ] || fail "$upper/data is not what was written"
    [ "$(cat "$upper/etc/motd")" = "$1" ] || fail "$upper/etc/motd is not what was written"
    on writable "$upper/data"
    for lower in $lowers; do
        on image "$lower"
    done
    [ $(($(used "$writable") - writable_before)) -ge 4096 ] ||
        fail "the writable disk has not got what the container wrote"
    [ $(($(used "$root") - image_before)) -lt 1024 ] ||
        fail "the image disk has got what the container wrote"
    report "ok: container $1 has its writes on the second disk, its image on the first"
}

# grows FILE SIZE: the file is larger, by more than a line that was being written.
grows() {
    [ "$(stat -c %s "$1")" -gt $(($2 + 10)) ]
}

# Checksums of all that images and containers have stored, except files that grow.
data() {
    find "$root/snapshots" "$writable/snapshots" -type f ! -name lines -exec cksum {} + | sort -k 3
}

# is_bare DISK: nothing is mounted in the disk's place, and nothing was written
# there.
is_bare() {
    case $1 in
    image) where=$root ;;
    writable) where=$writable ;;
    esac
    ! mountpoint "$where" || fail "there is something mounted at $where"
    [ -d "$where" ] || fail "the mount point $where is gone"
    found=$(find "$where" -mindepth 1)
    [ -z "$found" ] || fail "the bare mount point has: $found"
}

# Waits until a disk that the host was asked for is there.
plug() {
    report "plug $1"
    wait_for "the $1 disk" test -e "$(disk_of "$1")"
}

# What the first container has written is there.
is_as_before() {
    mounts_of first
    [ "$(cat "$upper/etc/motd")" = first ] || fail "what a container wrote is lost"
}

#
# Limits.
#

# "Make the disk" in docs/limits.md: the writable disk gets project quotas, and
# containers a default limit.
allow_limits() {
    systemctl stop "$program"
    umount "$writable"
    tune2fs -O quota,project -Q prjquota "$disk_writable" || fail "tune2fs"
    sed -i 's/^Options=.*/&,prjquota/' "/etc/systemd/system/$(unit_of writable)"
    sed -i 's/^OPTIONS=.*/OPTIONS="--default-max-size 64M"/' "/etc/default/$program"
    systemctl daemon-reload
    systemctl start "$(unit_of writable)" || fail "the disk is not mounted with prjquota"
    systemctl start "$program" || fail "the service does not start on a disk with quotas"
}

# status_says PATTERN
status_says() {
    "$program" status >/tmp/status || fail "status"
    grep -q "$1" /tmp/status || fail "status does not say '$1': $(cat /tmp/status)"
}

# projects: the list of repquota -P (quotactl(2), Q_GETNEXTQUOTA), a line for
# each project: its id, its limit in KiB, and the bytes and inodes that it takes.
projects() {
    perl -e '
        my ($device, $id) = (shift, 1);
        my $quota = "\0" x 72;
        while (syscall(179, (0x800009 << 8) + 2, $device, $id, $quota) == 0) {
            my ($hard, $bytes, $inodes) = (unpack "Q8 L2", $quota)[0, 2, 5];
            $id = (unpack "Q8 L2", $quota)[9];
            print "$id $hard $bytes $inodes\n" if $hard || $bytes || $inodes;
            $id++;
        }
        $!{ENOENT} or die "quotactl: $!";
    ' "$(readlink -f "$disk_writable")" || fail "the kernel has no project quotas"
}

# The limits in KiB of all projects, in one line.
limits() {
    projects | cut -d ' ' -f 2 | paste -s -d ' '
}

# limits_are LIST
limits_are() {
    [ "$(limits)" = "$1" ]
}

# Makes containerd remove what nothing refers to.
collect_garbage() {
    ctr leases create --id collect >/dev/null
    ctr leases rm --sync collect
}

has_no_projects() {
    [ -z "$(projects)" ]
}

# says LINE: the container "limited" has printed this line.
says() {
    grep -q -x "$1" "$limited_said"
}

# A container sees its limit, reaches it, and gets a higher one while it runs.
# After its removal, nothing of it is left.
limited_life() {
    # The words in quotes are for the shell in the container.
    # shellcheck disable=SC2016
    ctr run --rm --snapshotter rwsplit --snapshotter-label "$label_max_size=16Mi" \
        "$image" limited /bin/sh -c '
            size() {
                df -k -P / | tail -n 1 | tr -s " " | cut -d " " -f 2
            }
            echo "size $(size)"
            dd if=/dev/zero of=/first bs=64k count=1024 2>&1 && echo "no limit"
            echo "written $(stat -c %s /first)"
            until [ "$(size)" = 32768 ]; do sleep 0.2; done
            dd if=/dev/zero of=/second bs=64k count=128 2>&1 && echo "got more"
            dd if=/dev/zero of=/third bs=64k count=1024 2>&1 && echo "no limit"
            exit 7
        ' >"$limited_said" 2>&1 &
    limited=$!
    wait_for "the first limit" says 'written .*'
    says 'size 16384' || fail "df in a container does not show its limit"
    says 'dd: .*: Disk quota exceeded' || fail "at its limit a container gets another error"
    ! says 'no limit' || fail "a container writes more than it may"
    written=$(sed -n 's/^written //p' "$limited_said")
    [ "$written" -gt 15728640 ] || fail "a container may write $written bytes only"

    # The file system, the snapshotter (through containerd), and du report the
    # same.
    sync -f "$writable"
    top=$(sed -n 's|.*/limited/rootfs .*,upperdir=\([^,]*\)/fs,.*|\1|p' /proc/mounts)
    taken="$(du -s -B 1 "$top" | cut -f 1) $(du -s --inodes "$top" | cut -f 1)"
    [ "$(projects | cut -d ' ' -f 2-)" = "16384 $taken" ] ||
        fail "the projects are: $(projects), and the container takes $taken"
    ctr snapshots --snapshotter rwsplit usage -b limited >/tmp/usage
    [ "$(awk '$1 == "limited" { print $2, $3 }' /tmp/usage)" = "$taken" ] ||
        fail "containerd gets a usage of: $(cat /tmp/usage), not $taken"
    status_says 'limited  *of 16M$'
    report "ok: a container reaches its limit"

    ctr snapshots --snapshotter rwsplit label limited "$label_max_size=32Mi"
    ended=0
    wait "$limited" || ended=$?
    [ "$ended" = 7 ] || fail "the limited container has ended with $ended"
    says 'got more' || fail "a larger limit makes no difference"
    [ "$(grep -c 'Disk quota exceeded' "$limited_said")" = 2 ] ||
        fail "the larger limit is not kept"
    collect_garbage
    wait_for "the end of its project" has_no_projects
    status_says 'limits are enforced, 0 project ids given out'
    report "ok: its limit was raised, and nothing is left of it"
}

no_container_runs() {
    ! ctr run --snapshotter rwsplit "$image" refused true >/tmp/said 2>&1 ||
        fail "a container runs although there is no writable disk"
    grep -q "$writable" /tmp/said || fail "what refuses a container does not name $writable"
}

# The lines of "A trial" in docs/recovery.md, with the image that is there.
heal_walk() {
    awk '
        /^## A trial: / { there = 1; next }
        there && /^#/ { exit }
        there && sub(/^    /, "")
    ' "$share/docs/recovery.md" | sed "s|^IMAGE=.*|IMAGE=$image|" >/tmp/walk
    sh -x /tmp/walk >/tmp/walked 2>&1
    cat /tmp/walked
    # It sees nothing, names the file, heals, and the data is there.
    grep -E '^(clean|healed layer .*|my data)$|^layer .* is damaged: ' /tmp/walked |
        sed 's/^layer .*/damaged/; s/^healed .*/healed/' | paste -s -d ' ' >/tmp/heard
    [ "$(cat /tmp/heard)" = "clean damaged healed clean my data" ] ||
        fail "the walk of docs/recovery.md has come to: $(cat /tmp/heard)"
    "$program" check --deep >/tmp/said || fail "the layer is not whole: $(cat /tmp/said)"
    daemon_pid || fail "no daemon runs after the healing"
    report "ok: a layer has healed beside the daemon, and its container has its data"
}

#
# The phases.
#

phase_install() {
    mkdir /root/first /root/next
    cd /root/first
    # As the README says under "Install", and docs/disks.md under "By the
    # script".
    tar xzf /test/first/$program-*-x86_64.tar.gz
    cd $program-*/
    # The limit is for supervise-daemon, which closes all possible descriptors one
    # by one: a million system calls take user-mode Linux half a minute.
    [ ! -e /sys/block/ubda ] || echo 'rc_ulimit="-n 4096"' >>openrc/$program.confd
    printf '%s\n%s\n' "$disk_image" "$disk_writable" |
        ./install.sh --image-device "$disk_image" --writable-device "$disk_writable" ||
        fail "install.sh"
    on image "$root"
    on writable "$writable"
    # The lines of docs/containerd.md for this containerd.
    awk -v root="$root" '
        /^\*\*containerd 1.6 and 1.7\*\*/ { there = 1; next }
        there && /^[^ ]/ { exit }
        there { sub(/^    /, ""); gsub(/ROOT/, root); print }
    ' "$share/docs/containerd.md" >>/etc/containerd/config.toml
    grep -q "$root/grpc.socks" /etc/containerd/config.toml || fail "docs/containerd.md has no stanza"
    # Under OpenRC the disk stays as install.sh has set it up.
    [ "$manager" != systemd ] || allow_limits
    restart_containerd
    ctr images import --snapshotter rwsplit /test/image.tar || fail "an image is not imported"
    [ "$manager" != systemd ] || limited_life
    run first
    report "ok: from the archive to a container"

    ctr run --detach --snapshotter rwsplit "$image" lasting /bin/sh -c \
        'while sleep 0.2; do echo line >>/lines; done'
    mounts_of lasting
    lines=$upper/lines
    wait_for "what the container writes" test -s "$lines"
    before=$(daemon_pid)
    cd /root/next
    tar xzf /test/next/$program-*-x86_64.tar.gz
    cd $program-*/
    ./install.sh || fail "install.sh of the next version"
    grep -q 'of the next version' "$share/CHANGELOG.md" || fail "it is not upgraded"
    after=$(daemon_pid) || fail "no daemon runs after the upgrade"
    [ "$before" != "$after" ] || fail "the daemon is still the old one"
    ctr tasks ls | grep -q '^lasting .*RUNNING' || fail "the container has ended"
    size=$(stat -c %s "$lines")
    wait_for "what the container writes after the upgrade" grows "$lines" "$size"
    wait_for "the upgraded service" serves
    run upgraded
    report "ok: upgraded while a container ran"
    heal_walk
}

phase_again() {
    wait_for "containerd" containerd_runs
    wait_for "the service" serves
    [ "$(started "$(daemon_pid)")" -lt "$(started "$(pgrep -x containerd)")" ] ||
        fail "containerd was started before the service"
    on image "$root"
    on writable "$writable"
    is_as_before
    # Without containerd, with a kernel that takes layers in one string only.
    mkdir /root/rescued
    "$program" mount first /root/rescued || fail "a snapshot is not mounted by hand"
    [ "$(cat /root/rescued/etc/motd)" = first ] || fail "by hand it is not what was written"
    echo by-hand >/root/rescued/by-hand
    "$program" umount /root/rescued || fail "a snapshot is not unmounted by hand"
    [ "$(cat "$upper/by-hand")" = by-hand ] || fail "what was written by hand is lost"

    ctr tasks start --detach lasting || fail "a container does not start again"
    ctr tasks exec --exec-id look lasting grep -q line /lines ||
        fail "a container does not see what it wrote"
    run second
    if [ "$manager" = systemd ]; then
        # The limits of exactly these containers, the walk's among them.
        of_limits='65536 65536 65536 65536 65536'
        limits_are "$of_limits" || fail "limits after a reboot: $(limits)"
        ! ctr run --rm --snapshotter rwsplit "$image" full \
            dd if=/dev/zero of=/full bs=1M count=80 >/tmp/said 2>&1 ||
            fail "a container writes more than it may after a reboot"
        grep -q 'Disk quota exceeded' /tmp/said ||
            fail "at its limit a container sees: $(cat /tmp/said)"
        collect_garbage
        wait_for "the end of its project" limits_are "$of_limits"
    fi
    report "ok: after a reboot"
}

# Under systemd: the services wait for a disk that is a little late.
phase_late() {
    wait_for "a login prompt" systemctl is-active "serial-getty@ttyS0"
    wait_for "the image disk" mountpoint "$root"
    sleep 5
    for unit in "$program" containerd; do
        state=$(systemctl is-active "$unit") || :
        [ "$state" = inactive ] || fail "$unit is $state, not waiting for the disk"
    done
    is_bare writable
    plug writable
    wait_for "containerd" containerd_runs
    on writable "$writable"
    ! journalctl -b -u "$program" | grep -E 'WARN|ERROR' || fail "it has not waited for the disk"
    run late
    report "ok: waited for a disk"

    give_up_soon writable
}

# Under systemd: without the writable disk, images are served.
phase_no_writable() {
    wait_for_boot
    wait_for "the service" serves
    on image "$root"
    no_container_runs
    parent=$(ctr snapshots --snapshotter rwsplit info first | sed -n 's/.*"Parent": "\(.*\)".*/\1/p')
    ctr snapshots --snapshotter rwsplit view look "$parent"
    ctr snapshots --snapshotter rwsplit mounts /mnt look >/tmp/mounts
    sh -e /tmp/mounts
    [ "$(cat /mnt/etc/motd)" = 'motd of layer 5' ] || fail "the layers are not as they were"
    umount /mnt
    # No layer of the image is in this namespace yet.
    ctr -n other images import --snapshotter rwsplit /test/image.tar || fail "no import"
    is_bare writable
    report "ok: without the writable disk"

    before=$(daemon_pid)
    plug writable
    wait_for "the writable disk's mount" mountpoint "$writable"
    is_as_before
    run after-writable
    [ "$(daemon_pid)" = "$before" ] || fail "it was started again"
    report "ok: the writable disk came at last"
    give_up_soon image
}

# Under systemd: the image disk is mounted when it appears, then the other one,
# and the service starts.
phase_no_image() {
    wait_for_boot
    is_not_served
    is_bare image
    report "ok: without the image disk"

    plug image
    wait_for "the service" serves
    wait_for "the writable disk's mount" mountpoint "$writable"
    on image "$root"
    is_as_before
    run after-image
    report "ok: the image disk came at last"
    uninstall
}

# Under OpenRC: the daemon waits until both disks are mounted.
phase_no_disks() {
    wait_for_boot
    is_not_served
    is_bare image
    report "ok: without disks"

    plug image
    mount "$root"
    is_not_served
    is_bare writable
    report "ok: without the writable disk"

    plug writable
    mount "$writable"
    wait_for "the service" serves
    is_as_before
    run after-disks
    report "ok: the disks came at last"
    uninstall
}

# And installs again.
uninstall() {
    ctr tasks start --detach lasting || fail "a container does not start again"
    mounts_of lasting
    lines=$upper/lines
    data >/tmp/before
    "$share/install.sh" uninstall || fail "uninstall"
    ! daemon_pid || fail "uninstall leaves the daemon running"
    for path in "/usr/local/bin/$program" "$share" "/etc/init.d/$program" \
        "/usr/local/lib/systemd/system/$program.service"; do
        [ ! -e "$path" ] || fail "uninstall leaves $path"
    done
    case $manager in
    systemd) ! systemctl cat "$program" || fail "systemd still knows the service" ;;
    openrc) ! rc-service --exists "$program" || fail "OpenRC still knows the service" ;;
    esac
    data >/tmp/after
    cmp /tmp/before /tmp/after || fail "uninstall has touched data"
    size=$(stat -c %s "$lines")
    wait_for "what the container writes without the daemon" grows "$lines" "$size"
    report "ok: uninstalled"

    cd /root/next/$program-*/
    ./install.sh || fail "install.sh"
    wait_for "the service that was installed again" serves
    data >/tmp/after
    cmp /tmp/before /tmp/after || fail "data has changed"
    run again
    report "ok: installed again"
}

case $phase in
install | again) "phase_$phase" ;;
late | no-writable | no-image | no-disks) "phase_$(echo "$phase" | tr - _)" ;;
*) fail "no such test" ;;
esac
trap - EXIT
sync
report "done"
poweroff
