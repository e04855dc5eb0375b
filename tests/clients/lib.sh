# Shared by disks.sh and debian.sh: a daemon on two volumes, a containerd that uses
# it, and checks that both volumes are as empty as before. A script reads this file
# after tests/lib.sh, within namespaces of its own; $scratch is its directory and
# $snapshotter the program.
#
# shellcheck shell=sh
# Scripts set and use what is not set or used here.
# shellcheck disable=SC2034,SC2154

daemon=
containerd=

# fail WORDS...: reports what went wrong, shows the ends of the logs, and exits.
fail() {
    echo "FAILED: $*"
    for log in "$scratch"/*.log; do
        [ -s "$log" ] || continue
        echo "--- the end of ${log##*/}:"
        tail -n 8 "$log"
    done
    exit 1
}

# end_after SECONDS: kills everything that still runs then, except process 1 of the
# namespace, which is to call this: the command that it waits for has failed, and it can
# report that. $watchdog is the process that can be killed before.
end_after() {
    [ $$ = 1 ] || die "this is not process 1"
    (
        sleep "$1"
        echo "after $1 s everything was killed"
        kill -s KILL -- -1
    ) &
    watchdog=$!
}

# expect WANTED FOUND WHAT: fails unless both are the same.
expect() {
    [ "$1" = "$2" ] || fail "$3: wanted '$1', found '$2'"
}

# start_daemon FLAG...: starts the daemon on $image and $writable.
start_daemon() {
    daemon_flags=$*
    # shellcheck disable=SC2086 # A list of words.
    "$snapshotter" --root-dir "$image" --writable-dir "$writable" \
        --address "$scratch/snapshotter.sock" $daemon_flags >"$scratch/daemon.log" 2>&1 &
    daemon=$!
    until_true "$daemon" grep -q 'serving on' "$scratch/daemon.log" ||
        fail "the daemon did not start"
}

# kill_daemon [FLAG...]: kills the daemon and starts it again, with the same flags, or with
# these.
kill_daemon() {
    [ $# = 0 ] || daemon_flags=$*
    kill -KILL "$daemon"
    cat "$scratch/daemon.log" >>"$scratch/earlier-daemons.log"
    wait "$daemon" || :
    # shellcheck disable=SC2086 # A list of words.
    start_daemon $daemon_flags
}

# start_containerd: starts a containerd that shares nothing with another one, and has
# the daemon as `rwsplit`. $containerd_more are further lines of its configuration, whose
# version is $containerd_version. $proxy_more are further lines of the stanza.
start_containerd() {
    cat >"$scratch/containerd.toml" <<TOML
version = ${containerd_version-2}
root = "$scratch/containerd"
state = "$scratch/containerd-state"
disabled_plugins = [${containerd_disabled-}]
[grpc]
  address = "$scratch/containerd.sock"
[ttrpc]
  address = "$scratch/containerd.sock.ttrpc"
[proxy_plugins.rwsplit]
  type = "snapshot"
  address = "$scratch/snapshotter.sock"
  ${proxy_more-}
  [proxy_plugins.rwsplit.exports]
    root = "$image"
[plugins."io.containerd.internal.v1.opt"]
  path = "$scratch/opt"
${containerd_more-}
TOML
    CONTAINERD_ADDRESS=$scratch/containerd.sock
    export CONTAINERD_ADDRESS
    containerd --config "$scratch/containerd.toml" --log-level warn >>"$scratch/containerd.log" 2>&1 &
    containerd=$!
    until_true "$containerd" ctr version || fail "containerd did not start"
}

# stop_all: ends containerd and the daemon, and fails if the daemon does not end well.
stop_all() {
    stop "$containerd" 20
    stop "$daemon" 20
    expect 0 "$stop_status" "how the daemon ended"
    umount_below "$scratch"
}

# umount_below DIR: unmounts everything that containerd has left mounted there.
umount_below() {
    for left in "$1/containerd" "$1/containerd-state" "$1/opt"; do
        [ ! -d "$left" ] || umount -R "$left" 2>/dev/null || :
    done
}

# names_on_volumes: prints all directories and files of both volumes, except the
# database, which keeps its size, and the daemon's own files.
names_on_volumes() {
    for volume in "$image" "$writable"; do
        find "$volume" -mindepth 1 -path "$volume/lost+found" -prune -o \
            -name 'metadata.db*' -o -name lock -o -name .ids -o -path "$image/writable/*" -o \
            -printf '%P %y\n' | sort
    done
}

# remember_empty and expect_empty: check that both volumes have the same names at both
# times. Deletions are not immediate: containerd collects garbage, and the daemon then
# empties its trash.
remember_empty() {
    names_on_volumes >"$scratch/empty"
}
expect_empty() {
    empty_tries=60
    until names_on_volumes | cmp -s - "$scratch/empty"; do
        empty_tries=$((empty_tries - 1))
        [ "$empty_tries" -gt 0 ] || {
            names_on_volumes | diff "$scratch/empty" - | head -n 30
            status
            fail "the volumes are not as empty as before"
        }
        collect_garbage
        sleep 0.5
    done
}

# collect_garbage: makes containerd remove what nothing refers to, in every
# namespace.
collect_garbage() {
    ctr -n default leases create --id collect >/dev/null 2>&1 || :
    ctr -n default leases rm --sync collect >/dev/null
}

# rwsplit WORD...: runs a command of the program on these volumes.
rwsplit() {
    "$snapshotter" "$@" --root-dir "$image" --writable-dir "$writable" \
        --address "$scratch/snapshotter.sock"
}
status() {
    rwsplit status
}

# expect_clean: fails unless `check` finds nothing wrong.
expect_clean() {
    rwsplit check >"$scratch/check.out" 2>&1 || {
        cat "$scratch/check.out"
        fail "check is not content"
    }
}

# layers_away: prints how many layers are still on the writable volume.
layers_away() {
    find "$image/snapshots" -mindepth 1 -maxdepth 1 -type l | wc -l
}
until_moved() {
    until_true "$daemon" no_layers_away || {
        status
        fail "$(layers_away) layers did not move to the image volume"
    }
}
no_layers_away() {
    [ "$(layers_away)" = 0 ]
}
