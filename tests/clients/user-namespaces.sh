# For in-debian.sh: containers and pods with ids of their own, with and without the
# capability by which the kernel maps the ids of the image's files.
#
# shellcheck shell=sh
# Scripts set and use what is not set or used here.
# shellcheck disable=SC2034,SC2154

capabilities='capabilities = ["rebase", "remap-ids"]'

ctr_user_namespaces() {
    export CONTAINERD_NAMESPACE=ctr
    ctr images import --snapshotter rwsplit "$scratch/image.tar"
    container_has_ids copied
    container_has_ids copied --remap-labels
    restart_containerd "$capabilities"
    container_has_ids copied
    # containerd's versions differ, as docs/containerd.md describes.
    case $(containerd --version) in
    *' 1.'*) container_is_refused 'invalid argument' ;;
    *' 2.1.'*) container_is_refused 'no such file or directory' ;;
    *) container_has_ids shared --remap-labels ;;
    esac
    # shellcheck disable=SC2046 # A list of words.
    ctr images rm --sync $(ctr images ls -q)
    restart_containerd ''
}
container_is_refused() {
    refuses run_mapped --remap-labels 2>"$scratch/refused"
    cat "$scratch/refused"
    grep -q "failed to mount .*$1" "$scratch/refused" || fail "the container was refused for another reason"
}

cri_user_namespaces() {
    pods_have_ids
    case $(containerd --version) in
    *' 1.'* | *' 2.1.'*) return ;;
    esac
    restart_containerd "$capabilities"
    pods_have_ids
    restart_containerd ''
}
pods_have_ids() {
    ROOT=$image WRITABLE=$writable /test/cri "$scratch/containerd.sock" localhost:5000/a:1.oci 3 userns
    remove_pods
}

# ids_on_one_disk: a daemon with both volumes on one disk, where containerd 2.1 can use the
# capability, too.
ids_on_one_disk() {
    export CONTAINERD_NAMESPACE=ctr
    begin_with "$scratch/image/one" "$scratch/image/one/writable" "$capabilities"
    ctr images import --snapshotter rwsplit "$scratch/image.tar"
    container_has_ids shared --remap-labels
    # shellcheck disable=SC2046 # A list of words.
    ctr images rm --sync $(ctr images ls -q)
    pods_have_ids
    begin_with "$scratch/image" "$scratch/writable" ''
    rm -r "$scratch/image/one"
}

# begin_with IMAGE WRITABLE LINES: starts the daemon again, with these volumes, and containerd,
# with these lines in the stanza of the proxy plugin.
begin_with() {
    stop "$containerd" 20
    stop "$daemon" 20
    image=$1
    writable=$2
    proxy_more=$3
    mkdir -p "$writable"
    start_daemon --relocate-after 1
    start_containerd
}

# restart_containerd LINES: restarts containerd with these lines in the stanza of the proxy
# plugin.
restart_containerd() {
    stop "$containerd" 20
    proxy_more=$1
    start_containerd
}

# container_has_ids LAYERS FLAG...: runs a container in a user namespace, with these flags of
# `ctr run`. It has to see the owners of its image, and what it writes has to be on the
# writable volume with the owners that the host sees. LAYERS is `shared` if the image's layers
# are those that any container uses, and `copied` if containerd has made a copy with other
# owners, which has to be on the image volume.
container_has_ids() {
    layers=$1
    shift
    run_mapped "$@"
    in_mapped '0 100000 65536' cat /proc/self/uid_map
    in_mapped '0 200000 65536' cat /proc/self/gid_map
    owners='0:0 0:0 1234:5678 1000:1000 65534:65534 0:42 1000:1000'
    seen='stat -c %u:%g / /etc/motd /srv/odd /srv/home /srv/drop /etc/shadow /opt/data/payload'
    # shellcheck disable=SC2086 # A list of words.
    in_mapped "$owners" $seen
    in_mapped '' sh -ec 'echo own >/own; echo more >>/etc/motd; rm /opt/app/only.txt; chown 1000:50 /own'
    as_user=$(ctr task exec --exec-id "e$(next_number)" --user 1000:1000 mapped sh -c 'echo user >/srv/home/file; id -u')
    expect 1000 "$as_user" "the user's id"
    mapped_files_are_in_place

    # The mount of a second start is made from what was written.
    stop_task mapped KILL
    ctr task start --null-io --detach mapped
    # shellcheck disable=SC2086 # A list of words.
    in_mapped "$owners" $seen
    in_mapped '1000:50 own motd of layer 5 more 1000:1000' \
        sh -c 'stat -c %u:%g /own; cat /own /etc/motd; stat -c %u:%g /srv/home/file'
    in_mapped '' ls -A /opt/app
    mapped_files_are_in_place
    stop_task mapped KILL
    ctr containers rm mapped
    collect_garbage
}

run_mapped() {
    ctr run --detach --null-io --snapshotter rwsplit --cgroup "$CGROUP/ctr" \
        --uidmap 0:100000:65536 --gidmap 0:200000:65536 "$@" localhost:5000/a:1.oci mapped sleep 100000
}

# in_mapped WORDS COMMAND...: checks what the command prints in the container.
in_mapped() {
    wanted=$1
    shift
    found=$(ctr task exec --exec-id "e$(next_number)" mapped "$@") || fail "$*: exit code $?, printed '$found'"
    expect "$wanted" "$(echo "$found" | xargs)" "$*"
}
# next_number: prints another number each time, also in a subshell.
next_number() {
    echo x >>"$scratch/numbers"
    wc -l <"$scratch/numbers"
}

# mapped_files_are_in_place: checks where the files of the container are, and to whom they
# belong on the host.
mapped_files_are_in_place() {
    expect '101000:200050' "$(owners_of "$writable" own)" "the owner of /own"
    expect '100000:200000' "$(owners_of "$writable" etc/motd)" "the owner of the changed file"
    expect '101000:201000' "$(owners_of "$writable" srv/home/file)" "the owner of the user's file"
    expect '' "$(owners_of "$image" own)$(owners_of "$image" srv/home/file)" "what is on the image volume"
    expect '' "$(owners_of "$writable" bin/busybox)" "the image's files on the writable volume"
    case $layers in
    shared) expect '0:0' "$(owners_of "$image" bin/busybox)" "the owner of the image's file" ;;
    copied) expect '0:0 100000:200000' "$(owners_of "$image" bin/busybox)" "the owners of the image's file and of its copy" ;;
    esac
}
# owners_of VOLUME PATH: prints the owners of the file in all snapshots on the volume.
owners_of() {
    find "$1/snapshots" -path "$1/snapshots/*/fs/$2" -printf '%U:%G\n' | sort | xargs
}
