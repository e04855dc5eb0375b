#!/bin/sh
# Run by debian.sh, as process 1, in the directory of another Debian: /test has the
# checkout's tests, the program, the client of CRI and, in /test/t, the volumes and the
# registry. $CGROUP is the cgroup that is removed afterwards, $RELEASE the name of that
# Debian.
set -eu

checkout=/test/checkout
# shellcheck source=tests/lib.sh
. "$checkout/tests/lib.sh"
# shellcheck source=tests/clients/lib.sh
. "$checkout/tests/clients/lib.sh"
# shellcheck source=tests/clients/healing.sh
. "$checkout/tests/clients/healing.sh"
# shellcheck source=tests/clients/user-namespaces.sh
. "$checkout/tests/clients/user-namespaces.sh"
# shellcheck source=tests/clients/reboots.sh
. "$checkout/tests/clients/reboots.sh"
scratch=/test/t
image=$scratch/image
writable=$scratch/writable
snapshotter=/test/snapshotter
dockerd=

# client NAME: runs the function NAME, and checks what must hold after each client. The
# first failure ends the script.
client() {
    under_way=$1
    began=$(date +%s)
    end_after 300
    {
        "$1"
        expect_clean
        expect_empty
    } >"$scratch/said" 2>&1
    kill "$watchdog"
    under_way=
    echo "clients: $system, $1: ok, $(($(date +%s) - began)) s"
}
report() {
    [ -n "$under_way" ] || return 0
    echo "clients: $system, $under_way: FAILED, $(($(date +%s) - began)) s"
    tail -n 100 "$scratch/said"
    tail -n 20 "$scratch/daemon.log" "$scratch/containerd.log"
}
under_way=
trap report EXIT

# says WANTED COMMAND...: checks that COMMAND prints this, and succeeds.
says() {
    wanted=$1
    shift
    found=$("$@") || fail "$*: exit code $?, printed '$found'"
    expect "$wanted" "$found" "$*"
}

# refuses COMMAND...: checks that COMMAND fails.
refuses() {
    ! "$@" || fail "$* succeeded"
}

#
# ctr
#

ctr_client() {
    export CONTAINERD_NAMESPACE=ctr
    ctr images import --snapshotter rwsplit "$scratch/image.tar"
    for name in a b c; do
        ctr images pull --snapshotter rwsplit --plain-http "localhost:5000/$name:1.oci" >"$scratch/pull-$name" 2>&1 &
        eval "pull_$name=$!"
    done
    # shellcheck disable=SC2154
    for pull in $pull_a $pull_b $pull_c; do
        wait "$pull" || fail "a pull failed: $(cat "$scratch"/pull-*)"
    done
    ctr run --detach --null-io --snapshotter rwsplit --cgroup "$CGROUP/ctr" localhost:5000/b:1.oci one \
        /bin/sh -c 'trap "exit 0" TERM; while :; do sleep 0.1; done'
    says 'motd of layer 5' ctr task exec --exec-id e1 one cat /etc/motd
    ctr task exec --exec-id e2 one sh -ec 'echo kept >/kept; rm /etc/motd; test ! -e /etc/obsolete.conf'
    kill_daemon
    until_true "$containerd" ctr snapshot --snapshotter rwsplit ls
    stop_task one TERM
    ctr task start --null-io --detach one
    says 'kept' ctr task exec --exec-id e3 one cat /kept
    refuses ctr task exec --exec-id e4 one cat /etc/motd
    stop_task one KILL
    ctr snapshot --snapshotter rwsplit diff one >"$scratch/diff.tar"
    says 'etc/.wh.motd' tar -tf "$scratch/diff.tar" etc/.wh.motd
    ctr snapshot --snapshotter rwsplit commit committed one
    ctr containers rm one
    ctr snapshot --snapshotter rwsplit rm committed
    # shellcheck disable=SC2046
    ctr images rm --sync $(ctr images ls -q)
}

# stop_task CONTAINER SIGNAL: ends its process, so that it can be started again.
stop_task() {
    ctr task kill -s "$2" "$1"
    until_true "$containerd" is_stopped "$1"
    ctr task rm "$1"
}
is_stopped() {
    ctr task ls | grep -q "^$1 .*STOPPED"
}

#
# CRI
#

cri_client() {
    # The sandbox image is pinned, and stays until ctr removes it.
    ROOT=$image /test/cri "$scratch/containerd.sock" localhost:5000/a:1.oci 20
    remove_pods
}
remove_pods() {
    # shellcheck disable=SC2046
    ctr -n k8s.io images rm --sync $(ctr -n k8s.io images ls -q)
}

start_registry() {
    /test/busybox httpd -p 127.0.0.1:5000 -h "$scratch/www" -c "$scratch/httpd.conf"
}

# A network for pods: a CNI plugin that only answers.
make_network() {
    mkdir -p "$scratch/cni/bin" "$scratch/cni/net.d"
    cat >"$scratch/cni/bin/nothing" <<'CNI'
#!/bin/sh
cat >/dev/null
case $CNI_COMMAND in
ADD) echo '{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"'"$CNI_NETNS"'"}],"ips":[{"version":"4","interface":0,"address":"10.9.8.7/32"}]}' ;;
VERSION) echo '{"cniVersion":"0.4.0","supportedVersions":["0.3.0","0.3.1","0.4.0"]}' ;;
esac
CNI
    chmod 755 "$scratch/cni/bin/nothing"
    cp "$scratch/cni/bin/nothing" "$scratch/cni/bin/loopback"
    echo '{"cniVersion":"0.4.0","name":"none","plugins":[{"type":"nothing"}]}' >"$scratch/cni/net.d/1.conflist"
}

# configure_containerd: pods get the snapshotter, as docs/containerd.md
# describes.
configure_containerd() {
    cni="bin_dir = \"$scratch/cni/bin\"
conf_dir = \"$scratch/cni/net.d\""
    case $(containerd --version) in
    *' 1.'*)
        containerd_more="
[plugins.\"io.containerd.grpc.v1.cri\"]
sandbox_image = \"localhost:5000/pause:1.oci\"
restrict_oom_score_adj = true
stats_collect_period = 1
[plugins.\"io.containerd.grpc.v1.cri\".containerd]
snapshotter = \"rwsplit\"
[plugins.\"io.containerd.grpc.v1.cri\".cni]
$cni
"
        return
        ;;
    esac
    containerd_version=3
    containerd_more="
[plugins.\"io.containerd.cri.v1.images\"]
snapshotter = \"rwsplit\"
stats_collect_period = 1
[plugins.\"io.containerd.cri.v1.images\".pinned_images]
sandbox = \"localhost:5000/pause:1.oci\"
[plugins.\"io.containerd.cri.v1.runtime\"]
restrict_oom_score_adj = true
[plugins.\"io.containerd.cri.v1.runtime\".cni]
$cni
"
    for name in overlayfs rwsplit; do
        containerd_more="$containerd_more
[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]
platform = \"linux/$(dpkg --print-architecture)\"
snapshotter = \"$name\"
differ = \"walking\"
"
    done
}

#
# Docker
#

start_dockerd() {
    dockerd --config-file "$scratch/daemon.json" >>"$scratch/dockerd.log" 2>&1 &
    dockerd=$!
    until_true "$dockerd" docker version || fail "dockerd did not start"
}
stop_dockerd() {
    stop "$dockerd" 30
}

configure_docker() {
    cat >"$scratch/daemon.json" <<JSON
{
  "features": { "containerd-snapshotter": true },
  "storage-driver": "rwsplit",
  "containerd": "$scratch/containerd.sock",
  "data-root": "$scratch/docker",
  "exec-root": "$scratch/docker-run",
  "cgroup-parent": "$CGROUP/docker",
  "live-restore": true,
  "bridge": "none", "iptables": false, "ip6tables": false
}
JSON
}

docker_containers() {
    start_dockerd
    says 'io.containerd.snapshotter.v1' docker info --format '{{index (index .DriverStatus 0) 1}}'
    docker load -i "$scratch/image.tar"
    docker rmi localhost:5000/a:1.oci
    for name in a b c; do
        docker pull -q "localhost:5000/$name:1.oci" >"$scratch/pull-$name" 2>&1 &
        eval "pull_$name=$!"
    done
    # shellcheck disable=SC2154
    for pull in $pull_a $pull_b $pull_c; do
        wait "$pull" || fail "a pull failed: $(cat "$scratch"/pull-*)"
    done
    docker tag localhost:5000/a:1.oci rich
    says 'motd of layer 5' docker run --rm --network none rich cat /etc/motd
    docker run -d --name one --network none rich sleep 100000
    docker exec one sh -ec 'echo new >/etc/new; rm /etc/motd; echo more >/opt/app/only.txt'
    says 'A /etc/new C /etc C /opt C /opt/app C /opt/app/only.txt D /etc/motd' \
        sh -c 'docker diff one | sort | xargs'
    echo copied >"$scratch/copied"
    docker cp "$scratch/copied" one:/srv/copied
    says copied docker exec one cat /srv/copied
    docker cp one:/etc/new "$scratch/back"
    says new cat "$scratch/back"
    docker restart -t 0 one
    says 'more' docker exec one cat /opt/app/only.txt
    docker export one >"$scratch/export.tar"
    says 'new' tar -xOf "$scratch/export.tar" etc/new
    refuses tar -xOf "$scratch/export.tar" etc/motd
    docker commit -c 'CMD ["cat","/srv/copied"]' one committed
    says copied docker run --rm --network none committed
    refuses docker run --rm --read-only --network none rich touch /etc/x
    says ok docker run --rm --read-only --tmpfs /scratch --network none rich sh -c 'touch /scratch/x && echo ok'
    says payload docker run --rm --network none -v /opt rich ls /opt/data
    images_are_kept committed
    docker_restores
    docker_restarts
    # shellcheck disable=SC2046 # A list of words.
    docker rm -fv $(docker ps -aq)
    docker_prunes
}

# images_are_kept NAME: an image that is saved, removed and loaded has the same digests.
images_are_kept() {
    before=$(docker image inspect --format '{{.Id}} {{.RootFS.Layers}}' "$1")
    docker save "$1" -o "$scratch/saved.tar"
    docker rmi "$1"
    docker load -i "$scratch/saved.tar"
    says "$before" docker image inspect --format '{{.Id}} {{.RootFS.Layers}}' "$1"
    docker save "$1" -o "$scratch/again.tar"
    expect "$(blobs_of "$scratch/saved.tar")" "$(blobs_of "$scratch/again.tar")" "the blobs that are saved again"
    docker rmi "$1"
}
blobs_of() {
    tar -tf "$1" | grep '^blobs/sha256/.' | sort | xargs
}

# Containers keep running while dockerd and containerd are restarted.
docker_restores() {
    first=$(docker inspect --format '{{.State.Pid}}' one)
    stop_dockerd
    [ -e "/proc/$first" ] || fail "the container ended with dockerd"
    start_dockerd
    says "$first" docker inspect --format '{{.State.Pid}}' one
    docker exec one sh -c 'echo after >/after'
    kill_daemon
    says after docker exec one cat /after
}

# The daemon is killed while ten containers use it, which are then started
# again.
docker_restarts() {
    for number in 1 2 3 4 5 6 7 8 9 10; do
        docker run -d --name "ten-$number" --restart always --network none rich \
            sh -c 'echo x >>/starts; exec sleep 100000' >/dev/null
    done
    kill_daemon
    # shellcheck disable=SC2046
    kill -KILL $(docker inspect --format '{{.State.Pid}}' $(docker ps -q --filter name=ten-))
    for number in 1 2 3 4 5 6 7 8 9 10; do
        until_true $$ twice "ten-$number" || fail "the container ten-$number was not started again"
    done
}
twice() {
    [ "$(docker exec "$1" cat /starts | xargs)" = 'x x' ]
}

docker_prunes() {
    docker buildx prune -af
    docker system prune -af --volumes
    expect '' "$(docker ps -aq)$(docker images -q)" "what is left after the prune"
    stop_dockerd
}

docker_builds() {
    start_dockerd
    docker load -i "$scratch/image.tar"
    docker tag localhost:5000/a:1.oci rich
    mkdir -p "$scratch/context"
    echo context >"$scratch/context/file"
    cat >"$scratch/context/Dockerfile" <<'DOCKERFILE'
FROM rich AS first
RUN --mount=type=cache,target=/cache echo cached >/cache/file && rm /etc/motd && echo one >/one
RUN mkdir /many && for i in 1 2 3 4 5 6 7 8 9; do echo $i >/many/$i; done && rm -r /opt/tool

FROM rich AS second
COPY file /from-context
RUN --mount=type=cache,target=/cache --mount=type=bind,from=first,target=/first \
    cat /cache/file /first/many/9 >/second

FROM rich
RUN mkdir /vol && echo of the image >/vol/file
VOLUME /vol
COPY --from=first /many /many
COPY --from=second --chmod=0711 /second /from-context /srv/
COPY --link --from=first /one /linked/one
RUN cat /linked/one >/srv/after-link && rm -r /opt/data && echo again >/opt/data
DOCKERFILE
    docker build --network none -t built "$scratch/context"
    says 'again 9 cached 9 context one 711' docker run --rm --network none built \
        sh -c '(cat /opt/data; ls /many | wc -l; cat /srv/second /srv/from-context /srv/after-link; stat -c %a /srv/second) | xargs'
    # An anonymous volume starts with the image's files.
    says 'of the image' docker run --rm --network none built cat /vol/file
    says 'of the image' docker run --rm --network none --read-only built cat /vol/file
    first=$(docker image inspect --format '{{.RootFS.Layers}}' built)
    docker build --network none -t built "$scratch/context"
    says "$first" docker image inspect --format '{{.RootFS.Layers}}' built
    images_are_kept built
    docker_prunes
}

#
# What runs.
#

system="Debian $RELEASE, $(containerd --version | sed 's/.* \([0-9][^ ]*\) .*/containerd \1/')"
/test/busybox ip link set lo up
start_registry
make_network
configure_docker
configure_containerd
start_daemon --relocate-after 1
start_containerd
remember_empty
all="ctr_client ctr_healing ctr_user_namespaces docker_containers docker_builds cri_client
    cri_user_namespaces docker_reboots docker_in_memory"
# Before 2.0, containerd cannot use the capability.
case $system in
*'containerd 1.'*) ;;
*) all="$all ids_on_one_disk" ;;
esac
for name in ${CLIENTS:-$all}; do
    client "$name"
done
stop_all
umount "$image" || fail "the image volume cannot be unmounted"
umount "$writable" || fail "the writable volume cannot be unmounted"
