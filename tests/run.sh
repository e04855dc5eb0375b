#!/bin/sh
# Runs every test there is, as root, after installing what is missing:
# formatting, lints, documentation, scripts, unit tests, tests on real disks
# and with real containerd, power cuts and failing disks in virtual machines,
# containerd's own snapshotter suite, and a release that is made, installed and
# booted.
# Leaves nothing out: a missing tool, kernel feature or root is a failure.
set -eu

cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
    echo "run.sh: the tests mount file systems, run them as root: sudo sh tests/run.sh" >&2
    exit 1
fi
# Tests that would be left out for a developer fail under CI.
export CI=true
# shellcheck source=tests/install-tools.sh
. tests/install-tools.sh
install_tools test

scratch=$(mktemp -d)
disk=
release=
openrc=
clean_up() {
    # Groups of their own: with all compilers and machines.
    [ -z "$release" ] || kill -- "-$release" 2>/dev/null || true
    [ -z "$openrc" ] || kill -- "-$openrc" 2>/dev/null || true
    if [ -n "$disk" ]; then
        umount -l "$scratch/disk" || true
        losetup -d "$disk" || true
    fi
    rm -rf "$scratch"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

passed=0
failed=0

# begin NAME, and at its end took: what is under way, and how long it took.
begin() {
    part=$1
    part_began=$(date +%s)
    echo "== $part"
}
took() {
    echo "== $part: $(($(date +%s) - part_began)) s"
}

# step NAME COMMAND...: runs a step, shows what it says, counts it as one test.
step() {
    begin "$1"
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        echo "== $part FAILED"
        failed=$((failed + 1))
    fi
    took
}

# rust_tests ARGUMENT...: cargo's tests, with these arguments for it. Adds up the
# closing lines of its test binaries.
rust_tests() {
    begin "cargo test $*"
    status=0
    failed_before=$failed
    cargo test --locked "$@" >"$scratch/cargo" 2>&1 || status=$?
    grep -vE '^ *(Compiling|Downloaded|Downloading) ' "$scratch/cargo"
    count=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$scratch/cargo" | paste -sd+ -)
    passed=$((passed + ${count:-0}))
    count=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$scratch/cargo" | paste -sd+ -)
    failed=$((failed + ${count:-0}))
    if grep -q '^test result: .* [1-9][0-9]* ignored' "$scratch/cargo"; then
        echo "run.sh: tests were ignored, which must not be here" >&2
        failed=$((failed + 1))
    fi
    # A binary that does not build, or dies, has no closing line.
    if [ "$status" != 0 ] && [ "$failed" = "$failed_before" ]; then
        failed=$((failed + 1))
    fi
    took
}

# suite NAME: containerd's own cases; the environment says with which daemon.
# The suite itself leaves out one case; any other that is missing is a failure.
suite() {
    begin "containerd's snapshotter suite, $1"
    status=0
    (cd "$scratch" && ./suite -test.v -test.root) >"$scratch/cases" 2>&1 || status=$?
    sed -n 's/^ *--- \([A-Z]*: TestSnapshotter\/.*\)/\1/p' "$scratch/cases" | sort -k2
    cases=$(grep -c '^ *--- PASS: TestSnapshotter/' "$scratch/cases" || true)
    skipped=$(sed -n 's/^ *--- SKIP: TestSnapshotter\/\([^ ]*\) .*/\1/p' "$scratch/cases")
    passed=$((passed + cases))
    if [ "$status" != 0 ] || [ "$cases" -lt 20 ] || [ "$skipped" != Rename ]; then
        grep -vE '^=== ' "$scratch/cases"
        echo "== $cases cases passed, left out: $skipped, exit code $status: FAILED"
        failed=$((failed + 1))
    fi
    took
}

# The release takes as long to compile as all tests together take to run, many of
# which wait for disks: it gets what time they leave.
begin_release() {
    setsid nice -n 19 sh tests/dist.sh all >"$scratch/release" 2>&1 &
    release=$!
    # Sessions get equal shares, however nice those in them are (sched(7), "The
    # autogroup feature").
    echo 19 >"/proc/$release/autogroup" 2>/dev/null || true
}

# The machines keep one processor busy each.
begin_openrc() {
    setsid sh tests/boot.sh openrc >"$scratch/openrc" 2>&1 &
    openrc=$!
}

# finish PID NAME: waits for what was begun, and shows what it has said.
finish() {
    status=0
    wait "$1" || status=$?
    cat "$scratch/$2"
    return "$status"
}

build_suite() {
    mkdir -p "$scratch/go/src"
    ln -s "$PWD/tests/suite" "$scratch/go/src/suite"
    (cd "$scratch/go/src/suite" &&
        GO111MODULE=off GOFLAGS='' GOPATH="$scratch/go:/usr/share/gocode" \
            go test -c -o "$scratch/suite" .)
}

step "formatting" cargo fmt --check
step "scripts" shellcheck .ci/run tests/*.sh tests/dist/*.sh tests/dist/deb/p* tests/boot/*.sh \
    tests/boot/*.initd openrc/*d
step "lints" cargo clippy --quiet --locked --all-targets -- -D warnings
# Not among all targets: `cargo test` leaves it out.
step "lints of the virtual machine's tests" cargo clippy --quiet --locked --test vm -- -D warnings
RUSTDOCFLAGS='-D warnings' step "documentation" \
    cargo doc --quiet --locked --no-deps --document-private-items
step "formatting of Go" test -z "$(gofmt -l tests)"
begin_release
rust_tests
rust_tests --test vm

step "suite's build" build_suite
export SNAPSHOTTER="$PWD/target/debug/overlay-read-write-splitting-snapshotter"
suite "one directory"
truncate -s 1G "$scratch/image"
mkfs.ext4 -q -F "$scratch/image"
disk=$(losetup --find --show "$scratch/image")
mkdir "$scratch/disk"
mount "$disk" "$scratch/disk"
SNAPSHOTTER_WRITABLE="$scratch/disk" suite "writable volume on another file system"
SNAPSHOTTER_WRITABLE="$scratch/disk" SNAPSHOTTER_FLAGS="--async-remove false" \
    suite "--async-remove false"

# The release; its parts build on one another.
step "static binaries and packages" finish "$release" release
release=
# The binary that is released, with musl's memory and threads.
SNAPSHOTTER="$PWD/dist/overlay-read-write-splitting-snapshotter-$(uname -m)" \
    SNAPSHOTTER_WRITABLE="$scratch/disk" suite "static binary"
step "packages, once more" sh tests/dist/test-same.sh
step "systemd unit" sh tests/dist/test-units.sh "dist/overlay-read-write-splitting-snapshotter-$(uname -m)"
step "archive" sh tests/dist/sandbox.sh test-install.sh
step "Debian package" sh tests/dist/sandbox.sh test-deb.sh
step "disks" sh tests/dist/sandbox.sh test-disks.sh
begin_openrc
step "boots under systemd" sh tests/boot.sh systemd
step "boots under OpenRC" finish "$openrc" openrc
openrc=

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
