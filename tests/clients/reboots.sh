# For in-debian.sh: Docker's containers across reboots, with a writable disk that is kept,
# with one that is lost, and with a writable volume in memory.
#
# shellcheck shell=sh
# Scripts set and use what is not set or used here.
# shellcheck disable=SC2034,SC2154

docker_reboots() {
    begin_containers
    # The image `made` moves. The init layers of the three containers are small, and stay
    # on the writable disk.
    until_true "$daemon" layers_away_are 3 || fail "$(layers_away) layers have not moved, wanted 3"

    reboot kept --relocate-after 1
    start_dockerd
    were_started one 'x x' 'x x'
    were_started upon 'x x' 'x x'
    refuses docker exec one ls /etc/motd
    made_is_whole

    # The writable disk is lost.
    reboot new --relocate-after 1
    start_dockerd
    refuses docker start one 2>"$scratch/refused"
    grep -q 'the writable volume is not at' "$scratch/refused" || fail "refused: $(cat "$scratch/refused")"
    stop "$daemon" 20
    rwsplit check --reset-writable --yes
    start_daemon --relocate-after 1
    until_connected
    docker start one upon
    containers_are_new
    end_containers
    end_boot_id
}

docker_in_memory() {
    reboot memory --relocate-after 1 --writable-volatile
    begin_containers
    until_moved
    # The init layer of `late` is lost with the memory.
    kill_daemon --relocate-after 1000 --writable-volatile
    until_connected
    run_always late rich
    were_started late x x
    expect 1 "$(layers_away)" "the layers in memory"

    reboot memory --relocate-after 1 --writable-volatile
    start_dockerd
    were_started late x 'x x'
    containers_are_new
    docker restart -t 0 one
    were_started one 'x x' 'x x x'
    docker rm -fv late
    docker volume rm data-late
    end_containers

    # The next client has two disks, as before.
    reboot new --writable-volatile
    kill_daemon --relocate-after 1
    until_connected
    end_boot_id
}

# begin_containers: starts the container `one`, which deletes a file of its image, and
# `upon`, whose image `made` comes from `docker commit`. The container `maker` has
# ended.
begin_containers() {
    start_dockerd
    docker load -i "$scratch/image.tar"
    docker tag localhost:5000/a:1.oci rich
    # A layer of less than 1 MiB may stay on the writable volume.
    docker run --name maker --network none rich \
        sh -ec 'dd if=/dev/zero of=/made bs=1M count=2; echo end >>/made; rm /etc/motd'
    docker commit maker made
    run_always one rich
    run_always upon made
    were_started one x x
    were_started upon x x
    docker exec one rm /etc/motd
}
end_containers() {
    docker rm -fv one upon maker
    docker volume rm data-one data-upon
    docker_prunes
}

# run_always NAME IMAGE: runs a container that Docker starts again after a reboot. It
# counts its starts in its own files and on a volume of Docker's.
run_always() {
    docker run -d --name "$1" --restart always --network none -v "data-$1:/data" "$2" \
        sh -ec 'echo x >>/starts; echo x >>/data/starts; exec sleep 100000'
}

# were_started NAME OWN DATA: waits until the container has recorded these starts in its own
# files and on its volume.
were_started() {
    until_true $$ has_starts "$@" ||
        fail "$1: wanted starts $2, $3, found $(docker exec "$1" tail /starts /data/starts 2>&1 | xargs)"
}
has_starts() {
    [ "$(docker exec "$1" sh -c 'xargs </starts; xargs </data/starts')" = "$2
$3" ]
}

# containers_are_new: checks that the containers have started from their images, while
# Docker's volumes have kept what was on them.
containers_are_new() {
    starts=$(docker exec one sh -c 'xargs </data/starts')
    were_started one x "$starts"
    were_started upon x "$starts"
    says 'motd of layer 5' docker exec one cat /etc/motd
    made_is_whole
}

# made_is_whole: checks that the image and its container have the files that were committed.
made_is_whole() {
    seen='test ! -e /etc/motd; wc -c </made; tail -n 1 /made'
    wanted_of_made=$(printf '%s\n' 2097156 end)
    says "$wanted_of_made" docker exec upon sh -ec "$seen"
    says "$wanted_of_made" docker run --rm --network none made sh -ec "$seen"
}

layers_away_are() {
    [ "$(layers_away)" = "$1" ]
}

# until_connected: waits until containerd reaches a daemon that was started again.
until_connected() {
    until_true "$containerd" ctr -n moby snapshot --snapshotter rwsplit ls ||
        fail "containerd does not reach the daemon"
}

# reboot WRITABLE FLAG...: ends all processes at once, undoes their mounts and those of the
# volumes, empties what is in memory, and then mounts the volumes and starts the daemon, with
# these flags, and containerd. The writable volume is the disk as it was (`kept`), an empty
# disk (`new`) or an empty tmpfs (`memory`).
reboot() {
    writable_then=$1
    shift
    kill -s KILL -- -1
    wait
    end_after 300
    cat "$scratch/daemon.log" >>"$scratch/earlier-daemons.log"
    until_true $$ nothing_is_left || fail "still mounted: $(mounted_points)"
    rm -rf "$scratch/containerd-state" "$scratch/docker-run" "$scratch"/*.sock "$scratch"/*.sock.ttrpc
    find /run -mindepth 1 -delete
    begin_boot_id

    mount_file "$scratch/image.ext4" "$image"
    case $writable_then in
    kept) mount_file "$scratch/writable.ext4" "$writable" ;;
    new)
        cp --sparse=always "$scratch/empty.ext4" "$scratch/writable.ext4"
        mount_file "$scratch/writable.ext4" "$writable"
        ;;
    memory) mount -t tmpfs tmpfs "$writable" ;;
    esac
    start_registry
    start_daemon "$@"
    start_containerd
}

# begin_boot_id: what processes see of the kernel's random id for this boot is another one
# from now on.
begin_boot_id() {
    end_boot_id
    cp /proc/sys/kernel/random/uuid "$scratch/boot_id"
    mount --bind "$scratch/boot_id" /proc/sys/kernel/random/boot_id
}
# end_boot_id: a container in a user namespace may mount /proc only if nothing hides a
# part of it.
end_boot_id() {
    ! mountpoint -q /proc/sys/kernel/random/boot_id || umount /proc/sys/kernel/random/boot_id
}

# nothing_is_left: unmounts everything below $scratch and /run, and removes the cgroups. Fails
# while something is left.
nothing_is_left() {
    mounted_points | tac | while read -r point; do
        umount "$point" || :
    done
    [ -z "$(mounted_points)" ] || return 1
    [ ! -d "/sys/fs/cgroup$CGROUP" ] ||
        find "/sys/fs/cgroup$CGROUP" -depth -type d -exec rmdir {} +
}
mounted_points() {
    cut -d ' ' -f 5 /proc/self/mountinfo | grep -e "^$scratch/" -e '^/run/' || :
}
