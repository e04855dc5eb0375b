#!/bin/sh
# Tests the systemd unit: systemd's own checks, and that the daemon works with
# the capabilities and the address family that the unit leaves.
#
#     test-units.sh BINARY
set -eu

cd "$(dirname "$0")/../.."
binary=$(realpath "$1")
program=overlay-read-write-splitting-snapshotter
# Systemd's exposure level times ten; the unit says what is left out of it.
most_exposure=55

fail() {
    echo "test-units.sh: $*" >&2
    [ ! -s "$scratch/log" ] || tail -n 20 "$scratch/log" >&2
    exit 1
}

scratch=$(mktemp -d)
daemon=
clean_up() {
    [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || :
    [ -z "$daemon" ] || wait "$daemon" 2>/dev/null || :
    ! mountpoint -q "$scratch/writable" || umount -l "$scratch/writable"
    ! [ -e "$scratch/root" ] || chattr -f -R -i "$scratch/root" || :
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# verify looks for the program, so the unit has to name one that exists.
unit=$scratch/$program.service
sed "s#/usr/local/bin/$program#$binary#" "systemd/$program.service" >"$unit"
said=$(systemd-analyze verify --man=no "$unit" 2>&1) || fail "systemd-analyze verify: $said"
[ -z "$said" ] || fail "systemd-analyze verify: $said"
# The timer's.
check=$scratch/$program-check.service
cp "systemd/$program-check.timer" "$scratch/"
sed "s#/usr/local/bin/$program#$binary#" "systemd/$program-check.service" >"$check"
said=$(systemd-analyze verify --man=no "$unit" "$check" "$scratch/$program-check.timer" 2>&1) ||
    fail "systemd-analyze verify: $said"
[ -z "$said" ] || fail "systemd-analyze verify: $said"
systemd-analyze security --no-pager --offline=true --threshold="$most_exposure" "$unit" \
    >"$scratch/security" || {
    grep '✗' "$scratch/security" >&2
    fail "systemd-analyze security: $(tail -n 1 "$scratch/security")"
}
tail -n 1 "$scratch/security"

# These options give the service mounts of its own, in which it would not see
# the host's volumes come and go.
! grep -nE '^(Private(Tmp|Devices|Mounts|IPC|Users|Network)|Protect(System|Home|Proc|KernelTunables|KernelModules|KernelLogs|ControlGroups)|ProcSubset|MountFlags|(ReadOnly|ReadWrite|Inaccessible|NoExec|Exec|Bind|BindReadOnly)Paths|TemporaryFileSystem|Root(Directory|Image)|DynamicUser)=' \
    "systemd/$program.service" || fail "the unit has lines that give the daemon mounts of its own"

# The capabilities of the unit, in setpriv's form, as a list.
# shellcheck disable=SC2046
set -- $(sed -n 's/^CapabilityBoundingSet=//p' "systemd/$program.service")
[ $# -gt 0 ] || fail "the unit has no CapabilityBoundingSet="
capabilities=-all
for capability in "$@"; do
    # A capability that root of this machine does not have (in a container, say)
    # cannot be given.
    name=$(echo "${capability#CAP_}" | tr '[:upper:]' '[:lower:]')
    if setpriv --dump | grep '^Capability bounding set:' | grep -qw "$name"; then
        capabilities=$capabilities,+$name
    else
        echo "test-units.sh: root has no $capability here"
    fi
done

mkdir "$scratch/root" "$scratch/writable"
mount -t tmpfs tmpfs "$scratch/writable"
: >"$scratch/log"
setpriv --no-new-privs --bounding-set "$capabilities" --inh-caps=-all \
    "$binary" --root-dir "$scratch/root" --writable-dir "$scratch/writable" \
    --relocate-after 0 >"$scratch/log" 2>&1 &
daemon=$!

# wait_until WHAT COMMAND...
wait_until() {
    what=$1
    shift
    tries=300
    until "$@"; do
        tries=$((tries - 1))
        if [ "$tries" = 0 ] || ! kill -0 "$daemon" 2>/dev/null; then
            fail "with the unit's capabilities: $what"
        fi
        sleep 0.1
    done
}
wait_until "it does not start" grep -q ' serving on ' "$scratch/log"

sh tests/packaging/build-client.sh "$scratch/client"
client() {
    "$scratch/client" "$scratch/root/grpc.socks" "$@" || fail "with the unit's capabilities: $*"
}

# A layer of a container with everything that a layer may have moves to the
# image volume, which in this case means that it is copied.
upper=$(client prepare container)
echo 'set-user-ID' >"$upper/program"
chown 1234:5678 "$upper/program"
chmod 6751 "$upper/program"
setcap cap_net_raw+ep "$upper/program"
mknod "$upper/null" c 1 3
chmod 0 "$upper/null"
mknod "$upper/whiteout" c 0 0
mkdir "$upper/directory"
setfattr -n trusted.overlay.opaque -v y "$upper/directory"
chown -h 1:2 "$upper/directory"
# A small layer would wait for its containers.
dd if=/dev/zero of="$upper/large" bs=1M count=2 status=none

describe() {
    (cd "$1" && stat -c '%n %f %u %g %t:%T' program null whiteout directory &&
        getfattr -d -m - -e hex program directory)
}
describe "$upper" >"$scratch/before"
client commit layer container
home=$scratch/root/snapshots/1
is_home() {
    [ -d "$home/fs" ] && [ ! -L "$home" ]
}
wait_until "no layer moves" is_home
describe "$home/fs" >"$scratch/after"
diff "$scratch/before" "$scratch/after" >&2 || fail "the layer has changed on its way"

# A file that was made immutable can be removed.
touch "$home/fs/immutable"
chattr +i "$home/fs/immutable" || fail "this file system knows no immutable files"
client remove layer
[ ! -e "$home" ] || fail "the layer is still there"
[ -z "$(ls -A "$scratch/root/trash")" ] || fail "the immutable file is still there"

kill "$daemon"
wait "$daemon" || fail "it ended with status $?"
daemon=
! grep -E ' (WARN|ERROR) ' "$scratch/log" || fail "it has warned"
echo "the unit is sound, and its capabilities suffice"
