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
# The script calls itself, with --inside, for the part that runs in namespaces of its
# own. However it ends, the kernel then ends all its processes and unmounts all its
# volumes.

set -eu

checkout=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tests/install-tools.sh
. "$checkout/tests/install-tools.sh"
image=docker.io/library/split-test:latest

# fail WORDS...: reports what went wrong, shows the ends of the logs, and exits.
fail() {
    echo "demo: FAILED: $*" >&2
    for log in "${scratch:-/nonexistent}"/*.log; do
        [ -s "$log" ] || continue
        echo "--- the end of ${log##*/}:" >&2
        tail -n 15 "$log" >&2
    done
    exit 1
}

#
# --inside: the demonstration, as process 1 of its own process and mount namespaces.
#

daemon=
containerd=
container=

# A container is named like the temporary directory, and so is its cgroup.
inside() {
    scratch=$1 snapshotter=$2 images=$3 writes=$4
    name=${scratch##*/}
    trap stop_inside EXIT
    # The signal came before the traps were set.
    [ ! -e "$scratch/stop" ] || exit 143

    # containerd, its shims and runc use fixed paths in /run, where those of the
    # host are.
    mount -t tmpfs tmpfs /run
    mkdir "$scratch/tmp"
    TMPDIR=$scratch/tmp
    CONTAINERD_ADDRESS=$scratch/containerd.sock
    CONTAINERD_NAMESPACE=demo
    export TMPDIR CONTAINERD_ADDRESS CONTAINERD_NAMESPACE

    if [ -z "$images" ]; then
        images=$scratch/image
        writes=$scratch/writable
        { make_volume "$images" 512M && make_volume "$writes" 512M; } 2>"$scratch/volumes.log" ||
            fail "no loop device could be mounted; name two directories on" \
                "different volumes in IMAGE_VOLUME and WRITABLE_VOLUME instead"
    fi
    image_device=$(stat -c %d "$images")
    writable_device=$(stat -c %d "$writes")
    [ "$image_device" != "$writable_device" ] ||
        fail "$images and $writes are on one filesystem; the demo needs two"

    start_daemon
    start_containerd

    say "importing the image, running a container"
    # From version 2 on, ctr has containerd unpack, which takes more
    # configuration. Unpacking by ctr is the same for the snapshotter.
    unpack=
    ! ctr images import --help | grep -q -e --local || unpack=--local
    # $unpack is one word or none.
    # shellcheck disable=SC2086
    ctr images import $unpack --snapshotter rwsplit "$scratch/image.tar" >"$scratch/import.log" 2>&1 ||
        fail "the image could not be imported"

    image_before=$(used "$images")
    writable_before=$(used "$writes")
    container=yes
    # The container's shell expands the script.
    # shellcheck disable=SC2016
    ctr run --snapshotter rwsplit --cgroup "/$name" "$image" "$name" /bin/sh -c '
        set -e
        dd if=/dev/urandom of=/data.bin bs=1M count=5 2>/dev/null
        echo "changed by the container" >/etc/motd
        sha256sum </data.bin
    ' >"$scratch/container.log" 2>&1 </dev/null || fail "the container did not run"
    image_after=$(used "$images")
    writable_after=$(used "$writes")

    find_layers
    show
    check

    stop_inside
    trap - EXIT
    # The daemon was stopped last.
    [ "$stop_status" = 0 ] || fail "the daemon ended with status $stop_status, not 0"
    echo
    echo "Success: image on $image_source, the container's writes on $writable_source."
}

start_daemon() {
    # With its database on the writable volume, the daemon writes to the image
    # volume only when images are pulled or removed.
    "$snapshotter" --root-dir "$images" --writable-dir "$writes" \
        --state-dir "$writes/state" --address "$scratch/snapshotter.sock" \
        >"$scratch/daemon.log" 2>&1 &
    daemon=$!
    until_true "$daemon" test -S "$scratch/snapshotter.sock" ||
        fail "the daemon did not start"
}

start_containerd() {
    # The opt plugin would make a directory in /opt; CRI, under its old name and
    # its new ones, needs a network configuration.
    cat >"$scratch/containerd.toml" <<END
version = 2
root = "$scratch/containerd"
state = "$scratch/containerd-state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.cri.v1.images",
  "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt",
]

[grpc]
  address = "$scratch/containerd.sock"

[ttrpc]
  address = "$scratch/containerd.sock.ttrpc"

[proxy_plugins.rwsplit]
  type = "snapshot"
  address = "$scratch/snapshotter.sock"
END
    containerd --config "$scratch/containerd.toml" --log-level warn >"$scratch/containerd.log" 2>&1 &
    containerd=$!
    until_true "$containerd" ctr version || fail "containerd did not start"
}

# The bytes used on the volume of DIR, after a flush.
used() {
    sync -f "$1"
    # shellcheck disable=SC2046 # three numbers
    set -- $(stat -f -c '%b %f %S' "$1")
    echo $((($1 - $2) * $3))
}

# Sets the directories that the container's root is mounted from: $lowers, the
# oldest first, and $upper.
find_layers() {
    options=$(ctr snapshots --snapshotter rwsplit mounts /mnt "$name" 2>"$scratch/mounts.log") ||
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

# Checks that everything in directory DIR, and DIR itself, is on device NUMBER.
all_on_device() {
    [ "$(find "$1/" -printf '%D\n' | sort -u)" = "$2" ]
}

# Checks what the demonstration has shown.
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
    [ "$(sha256sum <"$upper/data.bin")" = "$(cat "$scratch/container.log")" ] ||
        fail "$upper/data.bin is not what the container wrote"

    # /etc/motd in the newest layer is unchanged; the container changed its own
    # copy.
    [ "$(cat "$newest/etc/motd")" = 'motd of layer 5' ] ||
        fail "the container has changed its image: $newest/etc/motd"
    [ "$(cat "$upper/etc/motd")" = 'changed by the container' ] ||
        fail "$upper/etc/motd is not what the container wrote"

    # Another program may write to a volume that is not the demo's alone, but 5
    # MiB would be noticed.
    [ $((image_after - image_before)) -lt 1048576 ] ||
        fail "the container's writes have used space on the image volume"
    [ $((writable_after - writable_before)) -ge 5242880 ] ||
        fail "the container's writes have used no space on the writable volume"
}

# Ends what inside() started, in order, so that nothing remains that outlives
# the namespaces (a cgroup). Processes that do not end in time end with process
# 1.
stop_inside() {
    trap '' HUP INT TERM
    if [ -n "$container" ]; then
        for step in "tasks kill -s KILL" "tasks delete -f" "containers delete"; do
            # The same signal may have ended containerd. $step is a list of
            # words.
            # shellcheck disable=SC2086
            ! kill -0 "$containerd" 2>/dev/null || timeout 5 ctr $step "$name" >/dev/null 2>&1 || :
        done
        container=
    fi
    [ -z "$containerd" ] || stop "$containerd" 20
    containerd=
    [ -z "$daemon" ] || stop "$daemon" 20
    daemon=
    for volume in "$scratch/image" "$scratch/writable"; do
        [ ! -d "$volume" ] || umount "$volume" 2>/dev/null || :
    done
}

#
# The script as it is called.
#

images=
writes=

clean_up() {
    # The cgroup of a container that had to be killed; with cgroups v1 there is
    # one for each resource.
    for group in /sys/fs/cgroup/"${scratch##*/}" /sys/fs/cgroup/*/"${scratch##*/}"; do
        [ ! -d "$group" ] || rmdir "$group" 2>/dev/null || :
    done
    for path in "$images" "$writes"; do
        [ -z "$path" ] || rm -rf --one-file-system "$path"
    done
}

# Whether the kernel has filesystem NAME, perhaps in a module that is loaded
# now.
has_filesystem() {
    grep -qw "$1" /proc/filesystems || { modprobe "$1" && grep -qw "$1" /proc/filesystems; }
}

demo() {
    [ "$(id -u)" = 0 ] || fail "this must be run by root: sudo sh tests/demo.sh"

    if [ -n "${SNAPSHOTTER-}" ]; then
        install_tools run
        if [ ! -f "$SNAPSHOTTER" ] || [ ! -x "$SNAPSHOTTER" ]; then
            fail "SNAPSHOTTER is no program: $SNAPSHOTTER"
        fi
        snapshotter=$(realpath "$SNAPSHOTTER")
    else
        install_tools demo
        snapshotter=$checkout/target/release/overlay-read-write-splitting-snapshotter
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

    make_scratch
    if [ -z "${SNAPSHOTTER-}" ]; then
        cd "$checkout"
        # The user's configuration of cargo may name another target directory.
        build_with_progress cargo build --release --locked --target-dir "$checkout/target" ||
            fail "the build failed, see above"
    fi

    say "making the image"
    TMPDIR=$scratch sh "$checkout/tests/make-image.sh" "$scratch/image.tar" "$image" ||
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

    run_job_in_namespaces \
        sh "$checkout/tests/demo.sh" --inside "$scratch" "$snapshotter" "$images" "$writes"
}

case ${1-} in
'') demo ;;
--inside)
    shift
    inside "$@"
    ;;
*) fail "usage: sudo sh tests/demo.sh" ;;
esac
