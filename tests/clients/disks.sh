#!/bin/sh
# Every file system as image volume with every file system as writable volume.
#
#     sudo sh tests/clients/disks.sh [PAIR...]
#
# A PAIR is IMAGE+WRITABLE (ext4, xfs, btrfs, f2fs, tmpfs, fuse), KIND for one file
# system that holds both, or `subvolumes` for two subvolumes of one btrfs. Each pair
# gets a line and its seconds. On each:
#
# - containerd's own snapshotter suite, if SUITE names its program (run.sh builds it);
# - a container that changes its image in every way that a layer can hold is committed;
#   its layer, before and after it moves, and a container on it have the same content as
#   with containerd's own overlayfs snapshotter;
# - the container sees one device, and inode numbers that stay;
# - the daemon is killed in between; `check` finds nothing wrong;
# - after the last removal both volumes have nothing that was not there before, and can
#   be unmounted; the file system's own check is content.
#
# On FUSE as image volume (bindfs) the daemon refuses to start.
#
# Pairs with a file system that this kernel does not have run in a machine under user-mode
# Linux, whose root file system is that of this machine.
#
# Environment: SNAPSHOTTER is the program, BUSYBOX a static busybox.
set -eu

checkout=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/install-tools.sh
. "$checkout/tests/install-tools.sh"
# shellcheck source=tests/clients/lib.sh
. "$checkout/tests/clients/lib.sh"
image_name=docker.io/library/split-test:latest

# known KIND: whether this kernel has that file system, perhaps as a module.
known() {
    case $1 in
    fuse) [ -e /dev/fuse ] ;;
    *) grep -qw "$1" /proc/filesystems || { modprobe "$1" && grep -qw "$1" /proc/filesystems; } 2>/dev/null ;;
    esac
}

# make_disk KIND DIR: mounts a new file system on the new directory DIR.
make_disk() {
    mkdir "$2"
    case $1 in
    tmpfs)
        mount -t tmpfs -o size=512M tmpfs "$2"
        return
        ;;
    fuse)
        # A file system in user space that passes everything on to a directory.
        make_disk ext4 "$2.behind"
        # Otherwise a file with a new second name shows the old number of names for a
        # second.
        bindfs -o attr_timeout=0 "$2.behind" "$2"
        return
        ;;
    esac
    truncate -s 512M "$2.disk"
    case $1 in
    ext4) mkfs.ext4 -q -F "$2.disk" ;;
    *) "mkfs.$1" -q "$2.disk" >/dev/null ;;
    esac
    mount_file "$2.disk" "$2"
}

# check_disk KIND DIR: unmounts it and runs the file system's own check.
check_disk() {
    umount "$2" || fail "the volume $2 cannot be unmounted"
    case $1 in
    ext4) e2fsck -f -n "$2.disk" ;;
    xfs) xfs_repair -n "$2.disk" ;;
    btrfs) btrfs check "$2.disk" ;;
    f2fs) fsck.f2fs --dry-run "$2.disk" ;;
    fuse) check_disk ext4 "$2.behind" ;;
    esac >"$scratch/fsck.out" 2>&1 || {
        cat "$scratch/fsck.out"
        fail "the file system of $2 is damaged"
    }
}

# What a container can do to its image. decorate adds files that only the machine's
# root can make.
# shellcheck disable=SC2016 # The container expands it.
changes='
set -e
echo new >/etc/new
echo longer than it was >>/etc/motd
rm /opt/tool/first
mv /opt/app/only.txt /opt/app/renamed.txt
rm -r /srv/shared && mkdir /srv/shared && echo refilled >/srv/shared/file
mkdir -p /data/deep/er/still && chmod 1777 /data/deep
mkdir -p "/data/Größe und  Leerzeichen"; echo x >"/data/Größe und  Leerzeichen/%#=;&~[]{}()$?*!@+"
echo two >/data/two && ln /data/two /data/two.again && ln /data/two /data/deep/two
ln -s ../nowhere /data/dangling; ln -s "$(printf %01000d 0)" /data/long-link
mkfifo /data/fifo; mknod /data/null c 1 3; mknod /data/disk b 7 200
dd if=/dev/zero of=/data/sparse bs=1 count=1 seek=10000000 2>/dev/null
dd if=/dev/urandom of=/opt/data/payload bs=1000 count=1 seek=5 conv=notrunc 2>/dev/null
echo >"/data/$(printf %0255d 0)"
: >/data/empty; chown 1234:4000000 /data/empty; chmod 6711 /data/empty
touch -h -d "2001-02-03 04:05:06" /data/dangling; touch -d "1975-01-01 00:00:00" /etc/new
cat /opt/data/payload >/data/payload
'

# decorate DIR: sets attributes and times on the files of a running container.
decorate() {
    cp "$scratch/payload" "$1/opt/data/payload"
    cp "$scratch/payload" "$1/data/payload"
    setfattr -n user.note -v 'seen by all' "$1/data/two"
    setfattr -n trusted.note -v 'seen by root' "$1/data/deep"
    setfattr -n user.big -v "$(printf %01500d 7)" "$1/data/empty"
    setcap cap_net_raw+ep "$1/data/payload"
    setfacl -m u:1234:r,g:99:rw "$1/data/two"
    setfacl -d -m u:1234:rwx "$1/data/deep"
    # Times from the clock differ from run to run.
    find "$1"/bin "$1"/data "$1"/etc "$1"/opt "$1"/srv -newer "$scratch/payload" -exec touch -h -d '2020-02-02 02:02:02.2' {} +
    touch -d '2020-02-02' "$1/"
    touch -d '2030-07-08 09:10:11.123456789' "$1/data/deep/two"
    touch -d '2024-02-29 23:59:59.999999999' "$1/data/deep/er"
}

# describe DIR: prints everything that a container can see of a tree, except inode
# numbers and the sizes of directories. All names of one file are in one line.
describe() {
    (
        cd "$1"
        # /run is left out, because a container has another file system there.
        find . -mindepth 1 -path ./run -o \( -type d -printf '%P %M %U:%G %t\n' \) -o \
            \( -type l -printf '%P %M %U:%G %t %l\n' \) -o \
            -printf '%P %M %U:%G %s %n %t\n' | sort
        find . -mindepth 1 \( -type b -o -type c \) -exec stat -c '%n %t:%T' {} + | sort
        find . -type f -exec sha256sum {} + | sort -k 2
        find . -type f -links +1 -printf '%i %P\n' | sort |
            awk '$1 != last { if (NR > 1) print ""; last = $1 } { printf "%s ", substr($0, length($1) + 2) } END { print "" }' | sort
        # Attributes of the file system itself are not content.
        find . -print0 | sort -z | xargs -0 getfattr -P -h -d -e hex -m '^(user|security|trusted\.note|system\.posix)' 2>/dev/null
    )
}

# describe_layer NAME: mounts a view of a layer and describes it.
describe_layer() {
    ctr snapshot --snapshotter "$kind" view "view-$1" "$1" >/dev/null
    keep "view-$1"
    mkdir -p "$scratch/seen"
    ctr snapshot --snapshotter "$kind" mounts "$scratch/seen" "view-$1" >"$scratch/mount.sh"
    sh "$scratch/mount.sh" || fail "the view of $1 cannot be mounted: $(cat "$scratch/mount.sh")"
    describe "$scratch/seen"
    umount "$scratch/seen"
    ctr snapshot --snapshotter "$kind" rm "view-$1"
}

# keep NAME: protects this snapshot from containerd's garbage collection.
keep() {
    ctr snapshot --snapshotter "$kind" label "$1" containerd.io/gc.root=test >/dev/null
}

# start_container NAME and stop_container NAME: for a container that sleeps.
start_container() {
    # shellcheck disable=SC2086 # None or more words.
    ctr run --detach --null-io --snapshotter "$kind" --runc-root "$scratch/runc" ${2-} \
        --cgroup "/$cgroup-$1" "$image_name" "$1" /bin/sh -c "$changes"'
        trap "exit 0" TERM; : >/ready; while :; do sleep 0.05; done'
    process=$(ctr task ls | awk -v id="$1" '$1 == id { print $2 }')
    until_true "$containerd" test -e "/proc/$process/root/ready" || fail "the container did not get ready"
    rm "/proc/$process/root/ready"
}
stop_container() {
    ctr task kill "$1"
    until_true "$containerd" is_stopped "$1" || fail "the container $1 did not stop"
    ctr task rm "$1" >/dev/null
}
is_stopped() {
    ctr task ls | grep -q "^$1 .*STOPPED"
}

# expect_steady ROOT: in a container, everything is on one device, and directories keep their
# inode numbers when the kernel forgets them. GNU tar and `du -x` rely on that.
expect_steady() {
    numbers "$1" >"$scratch/numbers"
    [ "$(cut -d ' ' -f 1 "$scratch/numbers" | sort -u | wc -l)" = 1 ] ||
        fail "a container sees several devices: $(sort -u -k 1,1 "$scratch/numbers")"
    sync -f "$1/etc"
    echo 2 >/proc/sys/vm/drop_caches
    numbers "$1" | diff "$scratch/numbers" - >"$scratch/differ" ||
        fail "inode numbers have changed: $(head -n 5 "$scratch/differ")"
}
numbers() {
    (cd "$1" && find bin data etc opt srv -printf '%D %i %p\n' | sort -k 3)
}

# commit_content KIND: imports the image, changes it in a container, commits the
# container, and writes a description of the layer to $scratch/KIND.
commit_content() {
    kind=$1
    ctr images import --snapshotter "$kind" "$scratch/image.tar" >/dev/null
    start_container one
    decorate "/proc/$process/root"
    [ "$kind" = overlayfs ] || expect_steady "/proc/$process/root"
    # shellcheck disable=SC2119 # Without flags.
    [ "$kind" = overlayfs ] || kill_daemon
    # containerd dials a proxy plugin again after a pause.
    until_true "$containerd" ctr snapshot --snapshotter "$kind" ls || fail "no snapshots are listed"
    stop_container one
    ctr snapshot --snapshotter "$kind" commit committed one
    keep committed
    describe_layer committed >"$scratch/$kind"
}

# compare WHEN: checks that the layer looks like the built-in snapshotter's.
compare() {
    diff "$reference" "$scratch/rwsplit" >"$scratch/differ" || {
        cut -c 1-300 "$scratch/differ" | head -n 30
        fail "$1 the layer differs from the built-in's"
    }
}

# remove_content KIND: removes everything that commit_content has created.
remove_content() {
    ctr snapshot --snapshotter "$1" rm two
    ctr containers rm one
    ctr snapshot --snapshotter "$1" rm committed
    ctr images rm --sync "$image_name" >/dev/null
}

#
# --inside: one pair, or the reference, as process 1 of its own namespaces.
#

# enter: the beginning of each of them.
enter() {
    trap stop_inside EXIT
    end_after 300
    mount -t tmpfs tmpfs /run
    mkdir "$scratch/tmp"
    TMPDIR=$scratch/tmp
    CONTAINERD_NAMESPACE=disks
    export TMPDIR CONTAINERD_NAMESPACE
    cgroup=${scratch##*/}
    containerd_disabled='"io.containerd.grpc.v1.cri"'
}
stop_inside() {
    trap '' HUP INT TERM
    rmdir /sys/fs/cgroup/"$cgroup"-* 2>/dev/null || :
}

# reference KIND: the built-in snapshotter, on that file system. Some of what a container
# sees depends on it: f2fs gives a directory a new time when the overlay copies a file up.
reference() {
    enter
    image=$scratch/unused
    make_disk "$1" "$scratch/containerd"
    start_containerd
    commit_content overlayfs
}

# pair PAIR KIND: with the reference of that kind.
pair() {
    enter
    reference=$scratch/../reference-$2
    mkdir "$scratch/v"
    case $1 in
    subvolumes)
        image_kind=none writable_kind=none
        make_disk btrfs "$scratch/v/b"
        image=$scratch/v/b/images
        writable=$scratch/v/b/writes
        btrfs -q subvolume create "$image"
        btrfs -q subvolume create "$writable"
        ;;
    *+*)
        image_kind=${1%+*} writable_kind=${1#*+}
        image=$scratch/v/image
        writable=$scratch/v/writable
        make_disk "$image_kind" "$image"
        make_disk "$writable_kind" "$writable"
        ;;
    *)
        image_kind=none writable_kind=none
        make_disk "$1" "$scratch/v/b"
        image=$scratch/v/b/images
        writable=$image/writable
        mkdir -p "$writable"
        ;;
    esac
    if [ "$image_kind" = fuse ]; then
        expect_refused
        return
    fi
    [ -z "${SUITE-}" ] || run_suite

    start_daemon --relocate-after 1
    start_containerd
    remember_empty
    commit_content rwsplit
    compare "before it moves"
    move
    describe_layer committed >"$scratch/rwsplit"
    compare "after it has moved"
    expect_clean
    remove_content rwsplit
    expect_empty
    stop_all
    if [ "$image_kind" = none ]; then
        check_disk "${1%subvolumes}" "$scratch/v/b"
    else
        check_disk "$image_kind" "$image"
        check_disk "$writable_kind" "$writable"
    fi
}

# expect_refused: the daemon does not start here, says why, and leaves the writable volume
# empty; doctor says the same. FUSE's bindfs cannot exchange two names.
expect_refused() {
    refused=0
    timeout 30 "$snapshotter" --root-dir "$image" --writable-dir "$writable" \
        --address "$scratch/snapshotter.sock" >"$scratch/daemon.log" 2>&1 || refused=$?
    expect 1 "$refused" "the exit code of the daemon"
    grep -q 'cannot hold image layers.*cannot exchange two names' "$scratch/daemon.log" ||
        fail "the daemon does not say why it does not start"
    expect lost+found "$(ls "$writable")" "what a refused start has left"
    ! rwsplit doctor --json >"$scratch/doctor.out" || fail "doctor finds nothing wrong"
    grep -q 'cannot be used: cannot exchange two names' "$scratch/doctor.out" ||
        fail "doctor does not say what is wrong: $(cat "$scratch/doctor.out")"
}

# move: waits until the layer moves to the image volume.
move() {
    # Within one file system a layer moves by renaming, and waits until nothing stands on it.
    [ "$image_kind" = none ] || stand_on_layer
    until_moved
    [ "$image_kind" != none ] || stand_on_layer
}

# stand_on_layer: creates a snapshot on the layer, as a container does.
stand_on_layer() {
    ctr snapshot --snapshotter rwsplit prepare two committed >/dev/null
    keep two
}

run_suite() {
    mkdir "$image/s" "$writable/s"
    (cd "$image/s" && TMPDIR=$image/s SNAPSHOTTER=$snapshotter SNAPSHOTTER_WRITABLE=$writable/s \
        "$SUITE" -test.v -test.run '^TestSnapshotter$' -test.root) >"$scratch/suite.out" 2>&1 || :
    cases=$(grep -c '^ *--- PASS: TestSnapshotter/' "$scratch/suite.out" || :)
    skipped=$(sed -n 's/^ *--- SKIP: TestSnapshotter\/\([^ ]*\) .*/\1/p' "$scratch/suite.out")
    if [ "$cases" -lt 20 ] || [ "$skipped" != Rename ]; then
        grep -v '^=== ' "$scratch/suite.out"
        fail "containerd's suite: $cases cases passed, left out: $skipped"
    fi
    rm -rf "$image/s" "$writable/s"
}

#
# The script as it is called.
#

# inside DIR WHAT...: runs it in a directory of its own, and shows its output if it
# fails.
inside() {
    # A short name: the path of a socket below it is limited. In memory, because
    # the flushes of so many file systems would take most of the time.
    inside_dir=$scratch/$1
    mkdir "$inside_dir"
    mount -t tmpfs -o mode=755 tmpfs "$inside_dir"
    cp "$scratch/image.tar" "$scratch/payload" "$inside_dir/"
    shift
    run_job_in_namespaces sh "$checkout/tests/clients/disks.sh" --inside "$inside_dir" "$@" \
        >"$inside_dir/said" 2>&1
}

# leave DIR: removes the directory of `inside`, once the kernel has let go of its mounts.
leave() {
    until_true $$ umount "$scratch/$1" || die "$scratch/$1 cannot be unmounted"
    rmdir "$scratch/$1"
}

clean_up() {
    for left in r p; do
        ! mountpoint -q "$scratch/$left" || leave "$left"
    done
}

main() {
    snapshotter=${SNAPSHOTTER:-$checkout/target/release/overlay-read-write-splitting-snapshotter}
    export snapshotter
    find_builder
    find_busybox
    make_scratch
    TMPDIR=$scratch sh "$checkout/tests/make-image.sh" "$scratch/image.tar" "$image_name"
    # A layer below 1 MiB would stay in its place while something stands on it.
    head -c 1500000 /dev/urandom >"$scratch/payload"
    [ $# -gt 0 ] || set -- \
        ext4+ext4 ext4+xfs ext4+btrfs ext4+f2fs ext4+tmpfs \
        xfs+ext4 xfs+xfs xfs+btrfs xfs+f2fs xfs+tmpfs \
        btrfs+ext4 btrfs+xfs btrfs+btrfs btrfs+f2fs btrfs+tmpfs \
        tmpfs+ext4 tmpfs+xfs tmpfs+btrfs tmpfs+f2fs tmpfs+tmpfs \
        ext4 xfs btrfs tmpfs subvolumes fuse+ext4
    here=''
    elsewhere=''
    for pair in "$@"; do
        if known_pair "$pair"; then
            here="$here $pair"
        else
            elsewhere="$elsewhere $pair"
        fi
    done
    failures=0
    # shellcheck disable=SC2086 # Lists of words.
    run_pairs $here || failures=1
    # shellcheck disable=SC2086
    [ -z "$elsewhere" ] || run_machine $elsewhere || failures=1
    [ "$failures" = 0 ]
}

# known_pair PAIR: this kernel has both file systems.
known_pair() {
    for kind in $(echo "$1" | sed 's/subvolumes/btrfs/; s/+/ /'); do
        known "$kind" || return 1
    done
}

run_pairs() {
    pairs_failed=0
    for pair in "$@"; do
        began=$(date +%s)
        if run_pair "$pair"; then
            echo "disks: $pair: ok, $(($(date +%s) - began)) s"
        else
            echo "disks: $pair: FAILED, $(($(date +%s) - began)) s"
            pairs_failed=1
        fi
    done
    return "$pairs_failed"
}

# run_pair PAIR: after the reference for its writable volume, if that is the first.
run_pair() {
    on=${1#*+}
    [ "$on" != subvolumes ] || on=btrfs
    [ -e "$scratch/reference-$on" ] || run_inside r reference "$on" || return 1
    run_inside p pair "$1" "$on"
}

# run_inside DIR WHAT...: `inside`, and removes the directory afterwards.
run_inside() {
    inside_status=0
    inside "$@" || inside_status=$?
    if [ "$inside_status" != 0 ]; then
        cat "$inside_dir/said"
    elif [ "$2" = reference ]; then
        cp "$inside_dir/overlayfs" "$scratch/reference-$3"
    fi
    leave "$1"
    return "$inside_status"
}

# run_machine PAIR...: starts a machine with this directory and these PAIRs.
run_machine() {
    uml=$checkout/target/tools/uml
    if [ ! -e "$uml/linux" ]; then
        for pair in "$@"; do
            echo "disks: $pair: FAILED, 0 s"
        done
        echo "This kernel does not have them, and there is no user-mode Linux in $uml"
        return 1
    fi
    # The machine's memory is a file: best in the memory of this machine.
    available=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
    memory=$scratch
    [ "${available:-0}" -lt 2097152 ] || memory=/dev/shm
    # What the kernel does not know becomes the environment and the words of the first program.
    # shellcheck disable=SC2016
    run_job_in_namespaces timeout -k 10 900 sh -c 'cd "$1" && shift && exec "$@"' sh "$uml" \
        setarch -R env LD_LIBRARY_PATH=. TMPDIR="$memory" ./linux mem=1024M uml_dir="$scratch/" \
        root=/dev/root rootfstype=hostfs rootflags=/ ro console=tty0 con=null con0=null,fd:1 \
        ssl=null quiet PATH="$PATH" BUSYBOX="$BUSYBOX" SUITE="${SUITE-}" snapshotter="$snapshotter" \
        init=/bin/sh -- "$checkout/tests/clients/in-machine.sh" "$scratch" "$@" \
        >"$scratch/console" 2>&1 || :
    tr -d '\r' <"$scratch/console" >"$scratch/machine"
    if grep -q '^The machine is done, with exit code 0$' "$scratch/machine"; then
        grep '^disks: ' "$scratch/machine"
    else
        cat "$scratch/machine"
        return 1
    fi
}

case ${1-} in
--inside)
    scratch=$2
    shift 2
    "$@"
    ;;
--in-machine)
    scratch=$2
    first=$3
    shift 3
    failures=0
    run_pairs "$first" || failures=1
    # A system call takes long there, and containerd's suite makes many: one pair will do.
    SUITE=''
    run_pairs "$@" || failures=1
    exit "$failures"
    ;;
*) main "$@" ;;
esac
