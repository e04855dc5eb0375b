#!/bin/sh
# Runs the tests, as root, after installing what is missing (Debian 12).
#
#     sudo sh tests/run.sh         formatting, lints, documentation, unit tests, tests on
#                                  real disks and with real containerd, containerd's own
#                                  suite, the demo
#     sudo sh tests/run.sh --all   the same, and power cuts, failing disks and quotas in
#                                  virtual machines, every pair of file systems, newer
#                                  containerds, Docker and CRI, and releases that are
#                                  built, packed, installed and booted
#
# tests/README.md says what each part proves and how long it takes. Nothing is left
# out: a missing tool, kernel feature or root is a failure.
set -eu

cd "$(dirname "$0")/.."
checkout=$PWD
case ${1-} in
'') ring='test' ;;
--all) ring='all' ;;
*)
    echo "usage: sudo sh tests/run.sh [--all]" >&2
    exit 2
    ;;
esac
if [ "$(id -u)" != 0 ]; then
    echo "run.sh: the tests mount file systems, run them as root: sudo sh tests/run.sh" >&2
    exit 1
fi
# Under CI, tests that a developer's machine may ignore fail.
export CI=true
started=$(date +%s)
# shellcheck source=tests/install-tools.sh
. tests/install-tools.sh
install_tools "$ring"

# Process groups that run in the background.
shown_job=
release_job=
openrc_job=
clean_up() {
    for group in $shown_job $release_job $openrc_job; do
        stop "-$group" 60
    done
    ! mountpoint -q "$scratch/disk" || umount -l "$scratch/disk" || :
}
make_scratch

passed=0
failed=0
times=

# begin NAME and took: the name of the present part, and, at its end, how long
# it took.
begin() {
    part=$1
    part_began=$(date +%s)
    echo "== $part"
}
took() {
    part_seconds=$(($(date +%s) - part_began))
    echo "== $part: $part_seconds s"
    times="$times$(printf '%6s s  %s' "$part_seconds" "$part")
"
}

# step NAME COMMAND...: runs a step, shows its output, counts it as one test.
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

# rust_tests TARGET...: runs the tests of these targets, which have been built, as
# root, because the user who builds may be another one. Adds up their last lines.
rust_tests() {
    # $profile is a list of words.
    # shellcheck disable=SC2086
    for binary in $(as_builder cargo test $profile "$@" --no-run 2>&1 |
        sed -n 's/^ *Executable .*(\(.*\))$/\1/p'); do
        rust_test "$binary"
    done
}
rust_test() {
    name=${1##*/}
    begin "tests of ${name%-*}"
    failed_before=$failed
    run_shown env "SNAPSHOTTER_TESTS=$scratch" "$1"
    nothing_is_left || failed=$((failed + 1))
    count=$(sed -n 's/^test result: .* \([0-9]*\) passed; .*/\1/p' "$scratch/output")
    passed=$((passed + ${count:-0}))
    count=$(sed -n 's/^test result: .* \([0-9]*\) failed; .*/\1/p' "$scratch/output")
    failed=$((failed + ${count:-0}))
    if grep -q '^test result: .* [1-9][0-9]* ignored' "$scratch/output"; then
        echo "run.sh: tests were ignored, which must not be here" >&2
        failed=$((failed + 1))
    fi
    # A binary that dies prints no last line.
    if [ "$status" != 0 ] && [ "$failed" = "$failed_before" ]; then
        echo "== $part FAILED"
        failed=$((failed + 1))
    fi
    took
}

# run_shown COMMAND...: runs it, shows its output and leaves it in $scratch/output. $status
# is how it ended.
run_shown() {
    status=0
    : >"$scratch/output"
    timeout -k 60 1800 "$@" >>"$scratch/output" 2>&1 </dev/null &
    shown_job=$!
    # Not a pipe, which a process that is left behind would keep open.
    tail -n +1 -f -s 0.2 --pid="$shown_job" "$scratch/output"
    wait "$shown_job" || status=$?
    shown_job=
}

# Ends the processes that a test binary has left behind, and fails if there are any.
nothing_is_left() {
    left=$(grep -lsz "^SNAPSHOTTER_TESTS=$scratch\$" /proc/[0-9]*/environ | cut -d / -f 3)
    for pid in $left; do
        echo "run.sh: a test left a process behind: $(tr '\0' ' ' <"/proc/$pid/cmdline")" >&2
        kill -9 "$pid" || :
    done
    [ -z "$left" ]
}

# suite NAME: runs containerd's own cases; the environment chooses the daemon.
# The suite itself leaves out one case. Any other missing case is a failure.
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

build_suite() {
    mkdir -p "$scratch/go/src"
    ln -s "$PWD/tests/suite" "$scratch/go/src/suite"
    (cd "$scratch/go/src/suite" &&
        GO111MODULE=off GOFLAGS='' GOPATH="$scratch/go:/usr/share/gocode" \
            go test -c -o "$scratch/suite" .)
}

# clients NAME COMMAND...: a script of tests/clients. Each of its lines that ends with
# "ok" or "FAILED" and seconds is a test.
clients() {
    begin "$1"
    shift
    failed_before=$failed
    run_shown "$@"
    passed=$((passed + $(grep -c ': ok, [0-9]* s$' "$scratch/output" || true)))
    failed=$((failed + $(grep -c ': FAILED, [0-9]* s$' "$scratch/output" || true)))
    if [ "$status" != 0 ] && [ "$failed" = "$failed_before" ]; then
        echo "== $part FAILED"
        failed=$((failed + 1))
    fi
    took
}

# begin_release and begin_openrc start jobs in the background, each in a session of
# its own, so that it can be ended with all its compilers and machines.
#
# A release takes long to compile, and many tests wait for disks, so it gets the
# time that they leave.
begin_release() {
    setsid nice -n 19 sh packaging/release.sh all >"$scratch/release" 2>&1 &
    release_job=$!
    # Each session gets an equal share, whatever the nice values in it are
    # (sched(7), "The autogroup feature").
    echo 19 >"/proc/$release_job/autogroup" 2>/dev/null || true
}
# The machines use one processor each.
begin_openrc() {
    setsid sh tests/boot.sh openrc >"$scratch/openrc" 2>&1 &
    openrc_job=$!
}

# finish JOB OUTPUT: waits for such a job, and shows its output.
finish() {
    status=0
    wait "$1" || status=$?
    cat "$scratch/$2"
    return "$status"
}

# ring_ends NAME: prints how long the ring took, part by part.
ring_ends() {
    echo
    echo "$1, in $(($(date +%s) - started)) s:"
    printf '%s' "$times"
    echo
    times=
    started=$(date +%s)
}

#
# The ring of every day.
#

step "formatting" as_builder cargo fmt --check
step "scripts" shellcheck .ci/run tests/*.sh tests/packaging/*.sh packaging/*.sh packaging/deb/p* tests/boot/*.sh tests/clients/*.sh \
    packaging/completions/rwsplit.bash \
    tests/boot/*.initd openrc/*d
step "links of the documentation" sh tests/check-docs.sh
step "formatting of Go" test -z "$(gofmt -l tests)"

# One profile for all, so that gRPC is compiled once (Cargo.toml).
profile="--release --locked --features fault-points"
# $profile is a list of words.
# shellcheck disable=SC2086
build_tests() {
    build_with_progress cargo test $profile --tests --no-run
}
# shellcheck disable=SC2086
lint() {
    # The last two are not among all targets: `cargo test` leaves them out.
    as_builder cargo clippy --quiet $profile --all-targets -- -D warnings &&
        as_builder cargo clippy --quiet $profile --test vm --test bench -- -D warnings
}
# shellcheck disable=SC2086
document() {
    as_builder env RUSTDOCFLAGS='-D warnings' \
        cargo doc --quiet $profile --no-deps --document-private-items
}
step "build" build_tests
step "lints" lint
step "documentation" document
rust_tests --tests

step "suite's build" build_suite
export SNAPSHOTTER="$PWD/target/release/overlay-read-write-splitting-snapshotter"
make_volume "$scratch/disk" 1G
suite "one directory"
SNAPSHOTTER_WRITABLE="$scratch/disk" suite "writable volume on another file system"
SNAPSHOTTER_WRITABLE="$scratch/disk" SNAPSHOTTER_FLAGS="--async-remove false" \
    suite "--async-remove false"
unset SNAPSHOTTER
step "contents of disks" sh tests/packaging/sandbox.sh test-devices.sh
step "demo" sh tests/demo.sh
ring_ends "The tests of every day"

#
# The deeper ring.
#

if [ "$ring" = all ]; then
    begin_release
    rust_tests --test vm
    clients "file systems" env SUITE="$scratch/suite" sh tests/clients/disks.sh
    clients "clients of Debian 13" sh tests/clients/debian.sh trixie
    clients "clients of Debian unstable" sh tests/clients/debian.sh unstable
    # The release, whose parts build on one another.
    step "static binaries and packages" finish "$release_job" release
    release_job=
    # The released binary, with musl's memory management and threads.
    SNAPSHOTTER="$PWD/dist/overlay-read-write-splitting-snapshotter-$(uname -m)" \
        SNAPSHOTTER_WRITABLE="$scratch/disk" suite "static binary"
    step "packages, once more" sh tests/packaging/test-same.sh
    step "systemd unit" sh tests/packaging/test-units.sh \
        "dist/overlay-read-write-splitting-snapshotter-$(uname -m)"
    step "archive" sh tests/packaging/sandbox.sh test-install.sh
    step "Debian package" sh tests/packaging/sandbox.sh test-deb.sh
    step "disks" sh tests/packaging/sandbox.sh test-disks.sh
    # The machines use one processor each.
    begin_openrc
    step "boots under systemd" sh tests/boot.sh systemd
    step "boots under OpenRC" finish "$openrc_job" openrc
    openrc_job=
    ring_ends "The deeper tests"
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
