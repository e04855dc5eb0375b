#!/bin/sh
# Shows the snapshotter at work: a container whose image is on one volume and
# whose writes are on another.
#
#     sudo sh tests/demo.sh
#
# It installs what is missing (Debian 12), builds the daemon, makes two volumes
# out of sparse files, starts the daemon and a containerd of its own, imports a
# small image, runs a container that writes, and shows and checks which device
# holds what. Then it removes all it made, also when it is interrupted, except
# for the packages and the build. It does not touch a containerd that runs here.
#
# Environment:
#   SNAPSHOTTER      an existing daemon; nothing is built
#   IMAGE_VOLUME     directories on two volumes of your own, instead of the
#   WRITABLE_VOLUME  sparse files; a new directory is made in each, and removed
#   BUSYBOX          a static busybox to make the image from
#
# The script calls itself, in a session of its own, for what takes long
# (--build) and for what happens in namespaces of its own (--inside), so that it
# can be interrupted at any time and all of it ends.

set -eu

here=$(cd "$(dirname "$0")" && pwd)
checkout=${here%/*}
program=overlay-read-write-splitting-snapshotter
image=docker.io/library/split-test:latest

say() {
    echo "demo: $*"
}

# fail WORDS...: says what went wrong, shows the ends of the logs, ends.
fail() {
    echo "demo: FAILED: $*" >&2
    for log in "${work:-/nonexistent}"/*.log; do
        [ -s "$log" ] || continue
        echo "--- the end of ${log##*/}:" >&2
        tail -n 15 "$log" >&2
    done
    exit 1
}

# The shell runs these while it waits for a command that it started with `&`,
# and for other commands after they have ended.
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

#
# --build: the daemon.
#

build() {
    # shellcheck source=tests/install-tools.sh
    . "$here/install-tools.sh"
    install_tools demo
    cd "$checkout"
    # The user's configuration may name another target directory.
    as_builder cargo build --release --locked --target-dir "$checkout/target"
}

#
# --inside: the demonstration, as process 1 of its own process and mount
# namespaces. Whatever becomes of it, the kernel ends all processes and unmounts
# all volumes with it.
#

daemon=
containerd=
container=

# A container is named like the temporary directory, and so is its cgroup.
inside() {
    work=$1 snapshotter=$2 images=$3 writes=$4
    name=${work##*/}
    trap stop_inside EXIT
    # Told to stop before the traps were set.
    [ ! -e "$work/stop" ] || exit 143

    # containerd, its shims and runc have fixed places in /run, where those of
    # the host are.
    mount -t tmpfs tmpfs /run
    mkdir "$work/tmp"
    TMPDIR=$work/tmp
    CONTAINERD_ADDRESS=$work/containerd.sock
    CONTAINERD_NAMESPACE=demo
    export TMPDIR CONTAINERD_ADDRESS CONTAINERD_NAMESPACE

    if [ -z "$images" ]; then
        images=$work/image
        writes=$work/writable
        make_volume "$images"
        make_volume "$writes"
    fi
    image_device=$(stat -c %d "$images")
    writable_device=$(stat -c %d "$writes")
    [ "$image_device" != "$writable_device" ] ||
        fail "$images and $writes are on one filesystem; the demo needs two"

    start_daemon
    start_containerd

    say "importing the image, running a container"
    # From containerd 2 on, ctr lets the daemon unpack, which takes more
    # configuration; unpacking by ctr is the same for the snapshotter.
    unpack=
    ! ctr images import --help | grep -q -e --local || unpack=--local
    # $unpack is one word or none.
    # shellcheck disable=SC2086
    ctr images import $unpack --snapshotter rwsplit "$work/image.tar" >"$work/import.log" 2>&1 ||
        fail "the image could not be imported"

    image_before=$(used "$images")
    writable_before=$(used "$writes")
    container=yes
    # The container's script is the container's to expand.
    # shellcheck disable=SC2016
    ctr run --snapshotter rwsplit --cgroup "/$name" "$image" "$name" /bin/sh -c '
        set -e
        dd if=/dev/urandom of=/data.bin bs=1M count=5 2>/dev/null
        echo "changed by the container" >/etc/motd
        sha256sum </data.bin
    ' >"$work/container.log" 2>&1 </dev/null || fail "the container did not run"
    image_after=$(used "$images")
    writable_after=$(used "$writes")

    find_layers
    show
    check

    stop_inside
    trap - EXIT
    [ "$daemon_status" = 0 ] || fail "the daemon ended with status $daemon_status, not 0"
    echo
    echo "Success: image on $image_source, the container's writes on $writable_source."
}

# An ext4 volume of 512 MiB at DIR, made of a file that takes only the space
# that is used. The loop device goes when the volume is unmounted.
make_volume() {
    truncate -s 512M "$1.ext4"
    mkfs.ext4 -q -F "$1.ext4" >"$work/mkfs.log" 2>&1 || fail "mkfs.ext4 failed"
    mkdir "$1"
    mount -o loop,noatime "$1.ext4" "$1" 2>"$work/mount.log" ||
        fail "no loop device could be mounted; name two directories on" \
            "different volumes in IMAGE_VOLUME and WRITABLE_VOLUME instead"
}

# until_true PID COMMAND...: runs COMMAND until it succeeds, for 30 seconds or
# until process PID has ended.
until_true() {
    pid=$1
    shift
    tries=300
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] && kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.1
    done
}

start_daemon() {
    # With its database on the writable volume, too, the daemon writes to the
    # image volume only when images come and go.
    "$snapshotter" --root-dir "$images" --writable-dir "$writes" \
        --state-dir "$writes/state" --address "$work/snapshotter.sock" \
        >"$work/daemon.log" 2>&1 &
    daemon=$!
    until_true "$daemon" test -S "$work/snapshotter.sock" ||
        fail "the daemon did not start"
}

start_containerd() {
    # The opt plugin would make a directory in /opt; CRI, under its old name and
    # its new ones, needs a network configuration.
    cat >"$work/containerd.toml" <<END
version = 2
root = "$work/containerd"
state = "$work/containerd-state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt",
]

[grpc]
  address = "$work/containerd.sock"

[ttrpc]
  address = "$work/containerd.sock.ttrpc"

[proxy_plugins.rwsplit]
  type = "snapshot"
  address = "$work/snapshotter.sock"
END
    containerd --config "$work/containerd.toml" --log-level warn >"$work/containerd.log" 2>&1 &
    containerd=$!
    until_true "$containerd" ctr version || fail "containerd did not start"
}

# Bytes used on the volume of DIR, once all that was written is on it.
used() {
    sync -f "$1"
    # shellcheck disable=SC2046 # three numbers
    set -- $(stat -f -c '%b %f %S' "$1")
    echo $((($1 - $2) * $3))
}

# Asks the snapshotter what the container's root is mounted from: $lowers, the
# oldest first, and $upper.
find_layers() {
    options=$(ctr snapshots --snapshotter rwsplit mounts /mnt "$name" 2>"$work/mounts.log") ||
        fail "the snapshotter does not know the container's snapshot"
    options=${options##* -o }
    lowers=
    upper=
    old_ifs=$IFS
    IFS=,
    for option in $options; do
        case $option in
        upperdir=*) upper=${option#*=} ;;
        lowerdir=*)
            IFS=:
            for lower in ${option#*=}; do
                lowers=$lower${lowers:+:$lowers}
            done
            ;;
        esac
    done
    IFS=$old_ifs
    image_source=$(df --output=source "$images" | tail -n 1)
    writable_source=$(df --output=source "$writes" | tail -n 1)
}

# The name of the device that holds PATH.
device_of() {
    df --output=source "$1" | tail -n 1
}

kib() {
    echo $((($1 + 1023) / 1024))
}

show() {
    width=${#image_source}
    [ ${#writable_source} -le "$width" ] || width=${#writable_source}
    echo
    printf 'image volume     %-*s  %s\n' "$width" "$image_source" "$images"
    printf 'writable volume  %-*s  %s\n' "$width" "$writable_source" "$writes"
    echo
    echo 'The five layers of the image:'
    old_ifs=$IFS
    IFS=:
    for lower in $lowers; do
        printf '  %-*s  %s\n' "$width" "$(device_of "$lower")" "$lower"
    done
    IFS=$old_ifs
    echo 'What the container wrote:'
    for file in "$upper/data.bin" "$upper/etc/motd"; do
        [ -e "$file" ] || fail "the container's writes are not in $upper"
        printf '  %-*s  %s  %s KiB\n' "$width" "$(device_of "$file")" \
            "$file" "$(kib "$(stat -c %s "$file")")"
    done
    echo 'Space used on the volumes before and after the container ran:'
    printf '  %-*s  %6s KiB  %6s KiB\n' "$width" "$image_source" \
        "$(kib "$image_before")" "$(kib "$image_after")"
    printf '  %-*s  %6s KiB  %6s KiB\n' "$width" "$writable_source" \
        "$(kib "$writable_before")" "$(kib "$writable_after")"
}

# Everything in directory DIR, itself included, is on device NUMBER.
all_on_device() {
    [ "$(find "$1/" -printf '%D\n' | sort -u)" = "$2" ]
}

# What was shown is so.
check() {
    count=0
    old_ifs=$IFS
    IFS=:
    for lower in $lowers; do
        count=$((count + 1))
        newest=$lower
        case $lower in
        "$images"/snapshots/*/fs) ;;
        *) fail "the layer $lower is not in $images/snapshots" ;;
        esac
        all_on_device "$lower" "$image_device" ||
            fail "not all of the layer $lower is on $image_source"
    done
    IFS=$old_ifs
    [ "$count" = 5 ] || fail "the image has five layers, but $count are mounted"

    case $upper in
    "$writes"/snapshots/*/fs) ;;
    *) fail "the container's writes are in $upper, not in $writes/snapshots" ;;
    esac
    all_on_device "$upper" "$writable_device" ||
        fail "not all that the container wrote is on $writable_source"
    [ "$(stat -c %s "$upper/data.bin")" = 5242880 ] ||
        fail "$upper/data.bin has not the 5 MiB that the container wrote"
    [ "$(sha256sum <"$upper/data.bin")" = "$(cat "$work/container.log")" ] ||
        fail "$upper/data.bin is not what the container wrote"

    # /etc/motd is the newest layer's; the container changed its own copy.
    [ "$(cat "$newest/etc/motd")" = 'motd of layer 5' ] ||
        fail "the container has changed its image: $newest/etc/motd"
    [ "$(cat "$upper/etc/motd")" = 'changed by the container' ] ||
        fail "$upper/etc/motd is not what the container wrote"

    # Something else may write to a volume that is not the demo's alone, but
    # 5 MiB do not go unseen.
    [ $((image_after - image_before)) -lt 1048576 ] ||
        fail "the container's writes have used space on the image volume"
    [ $((writable_after - writable_before)) -ge 5242880 ] ||
        fail "the container's writes have used no space on the writable volume"
}

# Ends what inside() started, in order, so that nothing that outlives the
# namespaces (a cgroup) is left. What will not end, ends with process 1.
stop_inside() {
    trap '' HUP INT TERM
    if [ -n "$container" ]; then
        for step in "tasks kill -s KILL" "tasks delete -f" "containers delete"; do
            # $step is words.
            # shellcheck disable=SC2086
            timeout 10 ctr $step "$name" >/dev/null 2>&1 || :
        done
        container=
    fi
    stop "$containerd"
    containerd=
    stop "$daemon"
    daemon_status=$stop_status
    daemon=
    for volume in "$work/image" "$work/writable"; do
        [ ! -d "$volume" ] || umount "$volume" 2>/dev/null || :
    done
}

# stop PID: SIGTERM; after 20 seconds, SIGKILL. $stop_status is how it ended.
stop() {
    stop_status=0
    [ -n "$1" ] || return 0
    kill -TERM "$1" 2>/dev/null || :
    (
        sleep 20
        kill -KILL "$1"
    ) >/dev/null 2>&1 &
    watch=$!
    wait "$1" || stop_status=$?
    # Its sleep goes with the namespace.
    kill "$watch" 2>/dev/null || :
}

#
# The script as it is called.
#

job=
work=
images=
writes=

# run_job ARGS...: this script with ARGS, in its own session, so that all of it
# can be ended with one signal and a Ctrl-C is not for it.
run_job() {
    setsid "$@" </dev/null &
    job=$!
    status=0
    wait "$job" || status=$?
    job=
    return "$status"
}

clean_up() {
    trap '' HUP INT TERM
    if [ -n "$job" ]; then
        : >"$work/stop"
        kill -TERM "-$job" 2>/dev/null || kill -TERM "$job" 2>/dev/null || :
        wait "$job" || :
    fi
    [ -n "$work" ] || return 0
    # The kernel lets go of a loop device a little after its last mount.
    for file in "$work"/*.ext4; do
        [ -e "$file" ] || continue
        tries=50
        while [ -n "$(losetup -j "$file")" ] && [ "$tries" -gt 0 ]; do
            sleep 0.1
            tries=$((tries - 1))
        done
        losetup -j "$file" | while IFS=: read -r device _; do
            losetup -d "$device" || :
        done
    done
    # Of a container that had to be killed; cgroup 1 has one for each resource.
    for group in /sys/fs/cgroup/"${work##*/}" /sys/fs/cgroup/*/"${work##*/}"; do
        [ ! -d "$group" ] || rmdir "$group" 2>/dev/null || :
    done
    for path in "$work" "$images" "$writes"; do
        [ -z "$path" ] || rm -rf --one-file-system "$path"
    done
}

# The kernel has filesystem NAME, or has it once its module is loaded.
has_filesystem() {
    grep -qw "$1" /proc/filesystems || { modprobe "$1" && grep -qw "$1" /proc/filesystems; }
}

demo() {
    [ "$(id -u)" = 0 ] || fail "this must be run by root: sudo sh tests/demo.sh"

    # shellcheck source=tests/install-tools.sh
    . "$here/install-tools.sh"
    if [ -n "${SNAPSHOTTER-}" ]; then
        install_tools run
        if [ ! -f "$SNAPSHOTTER" ] || [ ! -x "$SNAPSHOTTER" ]; then
            fail "SNAPSHOTTER is no program: $SNAPSHOTTER"
        fi
        snapshotter=$(realpath "$SNAPSHOTTER")
    else
        install_tools demo
        snapshotter=$checkout/target/release/$program
    fi

    has_filesystem overlay 2>/dev/null || fail "this kernel has no overlay filesystem"
    case ${IMAGE_VOLUME:+image}${WRITABLE_VOLUME:+writable} in
    imagewritable) ;;
    '')
        [ -e /dev/loop-control ] || modprobe loop 2>/dev/null || :
        losetup -f >/dev/null 2>&1 ||
            fail "there are no loop devices here; name two directories on" \
                "different volumes in IMAGE_VOLUME and WRITABLE_VOLUME instead"
        ;;
    *) fail "set both IMAGE_VOLUME and WRITABLE_VOLUME, or neither" ;;
    esac

    trap clean_up EXIT
    work=$(mktemp -d /var/tmp/demo.XXXXXX)

    if [ -z "${SNAPSHOTTER-}" ]; then
        say "building the daemon; the first time this takes several minutes"
        if ! run_job sh "$here/demo.sh" --build >"$work/build.log" 2>&1; then
            # Twenty lines of a compiler's error say little.
            tail -n 60 "$work/build.log" >&2
            rm "$work/build.log"
            fail "the build failed, see above"
        fi
        rm "$work/build.log"
        [ -x "$snapshotter" ] || fail "the build has not made $snapshotter"
    fi

    say "making the image"
    TMPDIR=$work sh "$here/make-image.sh" "$work/image.tar" "$image" ||
        fail "the image could not be made"

    if [ -n "${IMAGE_VOLUME-}" ]; then
        images=$(mktemp -d "$(realpath "$IMAGE_VOLUME")/demo.XXXXXX")
        writes=$(mktemp -d "$(realpath "$WRITABLE_VOLUME")/demo.XXXXXX")
        for path in "$images" "$writes"; do
            case $path in
            /run/*) fail "the volumes must not be in /run, which the demo hides" ;;
            esac
        done
    fi

    # --kill-child and --pdeathsig: if this script, or unshare, is killed, all
    # in the namespaces is.
    run_job setpriv --pdeathsig KILL \
        unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        sh "$here/demo.sh" --inside "$work" "$snapshotter" "$images" "$writes"
}

case ${1-} in
'') demo ;;
--build) build ;;
--inside)
    shift
    inside "$@"
    ;;
*) fail "usage: sudo sh tests/demo.sh" ;;
esac
