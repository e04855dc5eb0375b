# For in-debian.sh: layers that a disk has damaged are named by `check --deep`, and healed by
# `check --heal` beside the running daemon.
#
# shellcheck shell=sh
# Scripts set and use what is not set or used here.
# shellcheck disable=SC2154

ctr_healing() {
    export CONTAINERD_NAMESPACE=ctr
    to_containerd="--containerd-address=$scratch/containerd.sock"
    ctr images import --snapshotter rwsplit "$scratch/image.tar"
    for name in one running; do
        ctr run --detach --null-io --snapshotter rwsplit --cgroup "$CGROUP/ctr-$name" localhost:5000/a:1.oci "$name" sleep 100000
        ctr task exec --exec-id e1 "$name" sh -ec 'echo own >/own; echo changed >/etc/hostname'
    done
    stop_task one KILL
    check_ends 0 --deep "$to_containerd"
    is_said '5 layers compared' '5 of them sound'

    # The first layer of the list is the last one of the image, which has changed /etc/motd.
    last=$(ctr snapshot --snapshotter rwsplit mounts /mnt one | sed 's/.*lowerdir=\([^:, ]*\).*/\1/')
    payload=$(find "$image/snapshots" -path '*/fs/opt/data/payload')
    printf M | dd of="$last/etc/motd" conv=notrunc
    sync -f "$last"
    echo 3 >/proc/sys/vm/drop_caches
    # Nothing but a comparison of all bytes sees that.
    check_ends 0
    check_ends 1 --deep "$to_containerd"
    is_said 'is damaged' 'etc/motd' '4 of them sound'
    rm "$payload"
    check_ends 1
    is_said 'is damaged'
    check_ends 1 --deep "$to_containerd"
    is_said 'etc/motd' 'opt/data/payload' '3 of them sound'
    expect 'Motd of layer 5' "$(cat "$last/etc/motd")" "the damaged file"

    check_ends 0 --heal "$to_containerd"
    is_said 'etc/motd' 'opt/data/payload' '3 of them sound' 'running" is mounted with the damaged files'
    expect 2 "$(grep -c '^healed layer' "$scratch/checked")" "the number of healed layers"
    expect 'motd of layer 5' "$(cat "$last/etc/motd")" "the healed file"
    # The running container keeps the damaged layer mounted until it is started again.
    says 'Motd of layer 5' ctr task exec --exec-id e2 running cat /etc/motd
    stop_task running KILL
    check_ends 0 --deep "$to_containerd"
    is_said '5 layers compared' '5 of them sound'

    for name in one running; do
        ctr task start --null-io --detach "$name"
        says 'own changed motd of layer 5 1048576' ctr task exec --exec-id e3 "$name" \
            sh -c '(cat /own /etc/hostname /etc/motd; wc -c </opt/data/payload) | xargs'
        stop_task "$name" KILL
        ctr containers rm "$name"
    done
    # shellcheck disable=SC2046 # A list of words.
    ctr images rm --sync $(ctr images ls -q)
}

# check_ends CODE FLAG...: runs `check` with these flags beside the daemon. It has to end with
# this exit code.
check_ends() {
    wanted=$1
    shift
    code=0
    rwsplit check "$@" >"$scratch/checked" 2>&1 || code=$?
    cat "$scratch/checked"
    expect "$wanted" "$code" "the exit code of check $*"
}
# is_said WORDS...: checks that this `check` has printed all of these.
is_said() {
    for words in "$@"; do
        grep -qF -e "$words" "$scratch/checked" || fail "check has not printed '$words'"
    done
}
