# What the scripts of the tests have in common. A script reads this file with `.`
# after it has set `checkout` to the directory of the checkout. From then on HUP,
# INT and TERM end the script like an exit, so that its EXIT trap runs.
#
# shellcheck shell=sh
# Scripts set and use what is not set or used here.
# shellcheck disable=SC2034,SC2154

script=${0##*/}
script=${script%.sh}

# The directory that make_scratch makes.
scratch=
# The command that run_job runs, as the id of its process and process group.
job=
# Words before a command that runs as the user who builds; none if that is this
# user. install-tools.sh sets them.
builder=

trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

say() {
    echo "$script: $*"
}

die() {
    echo "$script: $*" >&2
    exit 1
}

# minutes SECONDS: a duration in words.
minutes() {
    if [ "$1" -lt 100 ]; then
        echo "$1 s"
    else
        echo "$((($1 + 30) / 60)) min"
    fi
}

#
# A directory and a job, both of which end with the script.
#

# Makes $scratch, on a disk: /tmp may be memory. At the end of the script the job
# is stopped, the script's own `clean_up` runs, and the directory is removed.
make_scratch() {
    trap end_script EXIT
    scratch=$(mktemp -d "/var/tmp/$script.XXXXXX")
}

# Removes what the script itself has created. The script redefines this
# function.
clean_up() {
    :
}

# Runs at the end of a script that has called make_scratch, however it ends.
end_script() {
    trap '' HUP INT TERM
    [ -n "$scratch" ] || return 0
    # A job in namespaces of its own may not have set its traps yet.
    : >"$scratch/stop"
    [ -z "$job" ] || stop "-$job" 60
    clean_up
    release_loop_devices
    rm -rf --one-file-system "$scratch"
}

# run_job COMMAND...: runs the program COMMAND in a session of its own, so that one
# signal ends all of it, and a Ctrl-C does not reach it. The script can be
# interrupted meanwhile. Returns the status of COMMAND.
run_job() {
    setsid "$@" </dev/null &
    job=$!
    wait_for_job
}

wait_for_job() {
    job_status=0
    wait "$job" || job_status=$?
    job=
    return "$job_status"
}

# run_job_in_namespaces COMMAND...: like run_job, in mount and process namespaces
# of its own. COMMAND is process 1 there: all its processes and mounts end with it,
# and it ends if this script or unshare is killed.
run_job_in_namespaces() {
    run_job setpriv --pdeathsig KILL \
        unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$@"
}

# stop PROCESS SECONDS: sends SIGTERM to a child, or to its process group if the
# number has a minus sign, and SIGKILL if it has not ended after SECONDS. Sets
# $stop_status to the status of the child.
stop() {
    stop_status=0
    stop_tries=$(($2 * 10))
    # The group exists a little later than the child.
    kill -TERM "$1" 2>/dev/null || kill -TERM "${1#-}" 2>/dev/null || :
    while [ "$stop_tries" -gt 0 ] && kill -0 "$1" 2>/dev/null; do
        sleep 0.1
        stop_tries=$((stop_tries - 1))
    done
    kill -KILL "$1" 2>/dev/null || :
    wait "${1#-}" || stop_status=$?
}

# until_true PID COMMAND...: runs COMMAND until it succeeds. Returns false after 30
# seconds, or when process PID has ended.
until_true() {
    until_pid=$1
    until_tries=300
    shift
    until "$@" >/dev/null 2>&1; do
        until_tries=$((until_tries - 1))
        [ "$until_tries" -gt 0 ] && kill -0 "$until_pid" 2>/dev/null || return 1
        sleep 0.1
    done
}

#
# Volumes.
#

# make_volume DIR SIZE [OPTION...]: mounts an ext4 file system of SIZE on the new
# directory DIR. Its file, DIR.ext4, takes only the space that is used. The OPTIONs
# are for mkfs.ext4. The loop device goes when the volume is unmounted.
make_volume() {
    volume=$1
    truncate -s "$2" "$volume.ext4"
    shift 2
    mkfs.ext4 -q -F "$@" "$volume.ext4" && mkdir "$volume" &&
        mount_file "$volume.ext4" "$volume"
}

# mount_file FILE DIR: mounts the file system in FILE; its loop device goes with it. Not by
# `mount -o loop`, which asks every loop device of the machine and waits for each.
mount_file() {
    loop=$(losetup --find --show "$1") || return
    mount -o noatime "$loop" "$2" || mount_failed=1
    losetup -d "$loop"
    [ -z "${mount_failed-}" ]
}

# Waits until no loop device uses a volume below $scratch: the kernel releases a
# device a little after its last unmount.
release_loop_devices() {
    for file in "$scratch"/*.ext4; do
        [ -e "$file" ] || continue
        loop_tries=50
        while [ -n "$(losetup -j "$file")" ] && [ "$loop_tries" -gt 0 ]; do
            sleep 0.1
            loop_tries=$((loop_tries - 1))
        done
        losetup -j "$file" | while IFS=: read -r device _; do
            losetup -d "$device" || :
        done
    done
}

#
# Builds.
#

# build_with_progress COMMAND...: runs cargo as the user who builds, and shows the
# progress: on a terminal in one line, otherwise in a line every 20 seconds. Shows
# the output of cargo if it fails. Needs a scratch directory.
build_with_progress() {
    # The build script of grpcio-sys calls cmake, which reads these variables.
    if command -v ccache >/dev/null 2>&1; then
        export CMAKE_C_COMPILER_LAUNCHER=ccache CMAKE_CXX_COMPILER_LAUNCHER=ccache
    fi
    build_log=$scratch/build.log
    build_began=$(date +%s)
    grpc_dir=
    : >"$scratch/build.began"
    # The words without those that set the environment of cargo.
    build_words=$*
    say "building: cargo ${build_words#*cargo } (the first time several minutes, for gRPC's C++ core)"
    # $builder is a list of words. cargo reports its progress only on request.
    # shellcheck disable=SC2086
    $builder env CARGO_TERM_PROGRESS_WHEN=always CARGO_TERM_PROGRESS_WIDTH=120 \
        setsid "$@" >"$build_log" 2>&1 </dev/null &
    job=$!
    build_shown=$build_began
    while kill -0 "$job" 2>/dev/null; do
        sleep 1
        if [ -t 1 ]; then
            describe_build
            # No line is longer than a terminal's.
            printf '\r\033[K%.79s' "$script: $build_text"
        elif [ $(($(date +%s) - build_shown)) -ge 20 ]; then
            build_shown=$(date +%s)
            describe_build
            say "$build_text"
        fi
    done
    [ ! -t 1 ] || printf '\r\033[K'
    build_status=0
    wait_for_job || build_status=$?
    if [ "$build_status" != 0 ]; then
        # The messages about one error can be long.
        build_messages | tail -n 100 >&2
    else
        say "built in $(minutes $(($(date +%s) - build_began)))"
    fi
    rm "$build_log" "$scratch/build.began"
    return "$build_status"
}

# Prints the output of cargo without its progress bars.
build_messages() {
    tr '\r' '\n' <"$build_log" | grep -v '^ *[A-Z][a-z]* *\[[=> ]*\]\|^ *Downloading [0-9]* crate'
}

# Sets build_text to the state of the build.
describe_build() {
    build_seconds=$(($(date +%s) - build_began))
    build_text=$(tail -c 1000 "$build_log" | tr '\r' '\n' |
        sed -n 's,^ *Building \[[=> ]*\] \([0-9]*\)/\([0-9]*\): \(.*[^ ]\) *$,step \1 of \2 (\3),p' |
        tail -n 1)
    : "${build_text:=cargo prepares}"
    if find_grpc; then
        describe_grpc
        build_text="${build_text%% (*}, gRPC's C++ core: $grpc_text"
    else
        build_text="$build_text, $(minutes "$build_seconds") so far"
    fi
}

# gRPC's C++ core takes most of the time of a first build. For cargo it is one step,
# whose build script calls cmake and make. CMakeFiles/Progress has the progress of
# make only in percent of everything that cmake could build, so object files are
# counted here instead.

# Sets grpc_dir to the directory in which make works for this build, and grpc_files and
# grpc_work to the object files that it will make. Returns false if there is none.
find_grpc() {
    grpc_found=$(find "$checkout"/target/*/build/grpcio-sys-*/out/build/CMakeFiles/Progress \
        "$checkout"/target/*/*/build/grpcio-sys-*/out/build/CMakeFiles/Progress \
        -maxdepth 0 -newer "$scratch/build.began" 2>/dev/null | head -n 1)
    grpc_found=${grpc_found%/CMakeFiles/Progress}
    [ -n "$grpc_found" ] || return 1
    [ "$grpc_found" != "$grpc_dir" ] || return 0
    grpc_dir=$grpc_found
    # The rules of the libraries that grpc_unsecure depends on, and its own.
    # shellcheck disable=SC2046 # Lists of words.
    set -- $(cd "$grpc_dir" &&
        grep -h 'Building C.* object' CMakeFiles/grpc_unsecure.dir/build.make \
            $(sed -n 's,^CMakeFiles/grpc_unsecure.dir/all: \(.*\)/all$,\1/build.make,p' CMakeFiles/Makefile2) |
        weigh_objects)
    grpc_files=$1
    grpc_work=$2
    # shellcheck disable=SC2046 # Two numbers.
    set -- $(find "$grpc_dir" -name '*.o' | weigh_objects)
    grpc_first_work=$2
    grpc_began=$(date +%s)
}

# Prints how many lines name an object file, and the work in them: the files of grpc
# itself, which come last, take twice as long as the others.
weigh_objects() {
    awk '/grpc_unsecure\.dir/ { heavy++ } END { print NR, NR + heavy }'
}

describe_grpc() {
    # shellcheck disable=SC2046 # Two numbers.
    set -- $(find "$grpc_dir" -name '*.o' | weigh_objects)
    grpc_text="$1 of $grpc_files files"
    grpc_seconds=$(($(date +%s) - grpc_began))
    if [ "$grpc_seconds" -ge 10 ] && [ "$2" -gt "$grpc_first_work" ]; then
        grpc_text="$grpc_text, about $(minutes $((grpc_seconds * (grpc_work - $2) / ($2 - grpc_first_work)))) left"
    fi
}
