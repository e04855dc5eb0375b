#!/bin/sh
# check-binary.sh BINARY MACHINE: checks a static binary for MACHINE (x86_64,
# aarch64) as root: that it is static and small, that it starts and serves, and,
# if this machine runs it without an emulator, that it takes little memory.
set -eu

cd "$(dirname "$0")/.."
binary=$(realpath "$1")
machine=$2
# The limits.
most_bytes=6200000
most_idle_kib=6144
most_used_kib=8192
requests=10000
# Growth below this comes and goes with some callers.
most_grown_kib=512

fail() {
    echo "check-binary.sh: $machine: $*" >&2
    [ ! -s "$scratch/log" ] || tail -n 20 "$scratch/log" >&2
    exit 1
}

scratch=$(mktemp -d)
daemon=
clean_up() {
    if [ -n "$daemon" ]; then
        kill -KILL "$daemon" 2>/dev/null || :
        wait "$daemon" || :
    fi
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

case $machine in
x86_64) elf_machine='Advanced Micro Devices X86-64' ;;
aarch64) elf_machine=AArch64 ;;
*) fail "no such machine" ;;
esac
emulator=
[ "$(uname -m)" = "$machine" ] || emulator=qemu-$machine-static

# Static: no program interpreter, no shared library.
headers=$(readelf -hldW "$binary") || fail "readelf cannot read $binary"
case $headers in
*INTERP*) fail "$binary has a program interpreter" ;;
*NEEDED*) fail "$binary needs shared libraries" ;;
esac
echo "$headers" | grep -q "Machine: *$elf_machine\$" || fail "$binary is for another machine"
# The binary must not contain paths of the machine that it was built on. (Panics name
# src/root/, which is not a path in /root.)
for path in "$PWD" "${HOME:-/root}"; do
    [ "$path" != / ] || continue
    ! sed 's,src/root/,,g' "$binary" | grep -qaF "$path/" || fail "$binary has the path $path/ of this machine in it"
done

bytes=$(stat -c %s "$binary")
echo "$machine: $bytes bytes, static"
[ "$machine" != x86_64 ] || [ "$bytes" -le "$most_bytes" ] ||
    fail "$binary has $bytes bytes, more than $most_bytes"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
# $emulator is one word or none, here and below.
# shellcheck disable=SC2086
said=$($emulator "$binary" --version) || fail "--version fails"
[ "$said" = "overlay-read-write-splitting-snapshotter $version" ] ||
    fail "--version says '$said', Cargo.toml '$version'"

sh tests/packaging/build-client.sh "$scratch/client"

: >"$scratch/log"
# shellcheck disable=SC2086
$emulator "$binary" --root-dir "$scratch/root" >"$scratch/log" 2>&1 &
daemon=$!
tries=600
until grep -q ' serving on ' "$scratch/log"; do
    tries=$((tries - 1))
    if [ "$tries" = 0 ] || ! kill -0 "$daemon" 2>/dev/null; then
        fail "it does not start"
    fi
    sleep 0.1
done

# resident: prints the memory that the daemon takes, in KiB.
resident() {
    sed -n 's/^VmRSS:[[:space:]]*\([0-9]*\) kB/\1/p' "/proc/$daemon/status"
}

# at_most WHEN LIMIT: checks the memory, and leaves it in kib.
at_most() {
    kib=$(resident)
    echo "$machine: $kib KiB resident $1"
    [ "$kib" -le "$2" ] || {
        sed -n -e '/^Rss/p' -e '/^Threads/p' "/proc/$daemon/status" >&2
        fail "$kib KiB are resident $1, more than $2"
    }
}

if [ -z "$emulator" ]; then
    # The background work of the start is done by then.
    sleep 3
    at_most "when idle" "$most_idle_kib"
fi
"$scratch/client" "$scratch/root/grpc.socks" once || fail "it does not serve"
# For this, the daemon starts itself as a child process, which an emulator may not be
# able to do. The request is then refused, and the daemon serves all the same.
if ! said=$("$scratch/client" "$scratch/root/grpc.socks" mapped 2>&1); then
    case "$emulator:$said" in
    ?*:*'ask for mapped ids'*) echo "$machine: $said" ;;
    *) fail "it does not serve mapped ids: $said" ;;
    esac
    "$scratch/client" "$scratch/root/grpc.socks" once || fail "it does not serve after a refusal"
fi
if [ -z "$emulator" ]; then
    "$scratch/client" "$scratch/root/grpc.socks" many "$requests" || fail "it does not serve"
    at_most "after $requests requests" "$most_used_kib"
    "$scratch/client" "$scratch/root/grpc.socks" many $((2 * requests)) || fail "it does not serve"
    at_most "after $((3 * requests)) requests" $((kib + most_grown_kib))
fi

kill "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
[ "$status" = 0 ] || fail "it ended with status $status"
! grep -E ' (WARN|ERROR) ' "$scratch/log" | grep -v 'ask for mapped ids' || fail "it has warned"
echo "$machine: serves"
