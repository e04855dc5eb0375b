#!/bin/sh
# Docker, BuildKit, ctr and CRI of another Debian than the machine's, in a
# directory.
#
#     sudo sh tests/clients/debian.sh RELEASE     trixie (13) or unstable
#
# The folder target/tools/debian-RELEASE is made by mmdebstrap, once. What runs in it has
# mounts and processes of its own, and changes nothing in it. Each client gets a line
# and its seconds; after each, both volumes are as empty as before, and `check` finds
# nothing wrong.
#
# Environment: SNAPSHOTTER is the program, BUSYBOX a static busybox, CLIENTS the names of
# the clients that are to run, if not all.
set -eu

checkout=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tests/install-tools.sh
. "$checkout/tests/install-tools.sh"
# shellcheck source=tests/clients/lib.sh
. "$checkout/tests/clients/lib.sh"

# make_folder: makes the Debian, with everything that the clients need.
make_folder() {
    [ ! -d "$folder" ] || return 0
    say "making $folder"
    # The same mirror and proxy as this machine's apt. The words in parentheses are
    # apt's.
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT)' 'Created-By: Packages' |
        sed -n 's|^\(.*/debian/\{0,1\}\) main$|\1|p' | head -n 1)
    [ -n "$mirror" ] || die "apt has no mirror of Debian"
    apt-config dump | { grep '^Acquire::https\{0,1\}::Proxy' || :; } >"$scratch/options"
    # A mirror's index may be older than its own limit.
    echo 'Acquire::Check-Valid-Until "false";' >>"$scratch/options"
    rm -rf --one-file-system "$folder.new"
    mkdir -p "${folder%/*}"
    # Its mounts and processes end with it, also if it is interrupted.
    run_job_in_namespaces timeout -k 10 900 \
        mmdebstrap --mode=root --variant=minbase --aptopt="$scratch/options" --dpkgopt=force-unsafe-io \
            --include=docker.io,docker-cli,docker-buildx,containerd,runc,iptables,libstdc++6,libsystemd0 \
            "$release" "$folder.new" "$mirror" >"$scratch/mmdebstrap.out" 2>&1 || {
        tail -n 40 "$scratch/mmdebstrap.out" >&2
        die "Debian $release could not be had from $mirror"
    }
    mv "$folder.new" "$folder"
}

# build_cri: the client of CRI, which needs no library of the Debian in the folder.
build_cri() {
    mkdir -p "$scratch/go/src"
    ln -s "$checkout/tests/clients/cri" "$scratch/go/src/cri"
    (cd "$scratch/go/src/cri" &&
        CGO_ENABLED=0 GO111MODULE=off GOFLAGS='' GOPATH="$scratch/go:/usr/share/gocode" \
            go build -o "$scratch/cri.program" .) || die "the client of CRI was not built"
}

# make_registry: makes the files of a registry, for a plain web server: NAME:1.oci for
# the NAMEs a, b, c, and pause, which sleeps.
make_registry() {
    mkdir -p "$scratch/layout" "$scratch/www/v2"
    TMPDIR=$scratch GZIP_LAYERS=1 sh "$checkout/tests/make-image.sh" "$scratch/image.tar" localhost:5000/a:1.oci
    tar -C "$scratch/layout" -xf "$scratch/image.tar"
    blobs=$scratch/layout/blobs/sha256
    manifest=$blobs/$(sed 's/.*manifest.v1+json","digest":"sha256:\([0-9a-f]*\).*/\1/' "$scratch/layout/index.json")
    config=$(sed 's/.*config.v1+json","digest":"sha256:\([0-9a-f]*\).*/\1/' "$manifest")
    for name in a b c; do
        offer "$name" "$manifest"
    done
    sed 's|"Cmd":\["/bin/sh"\]|"Cmd":["/bin/sleep","1000000"]|' "$blobs/$config" >"$scratch/config"
    sleeping=$(sha256sum <"$scratch/config")
    sleeping=${sleeping%% *}
    mv "$scratch/config" "$blobs/$sleeping"
    sed "s|$config\",\"size\":[0-9]*|$sleeping\",\"size\":$(stat -c %s "$blobs/$sleeping")|" "$manifest" >"$scratch/manifest"
    offer pause "$scratch/manifest"
    echo '.oci:application/vnd.oci.image.manifest.v1+json' >"$scratch/httpd.conf"
}

# offer NAME MANIFEST: offers the file MANIFEST as NAME:1.oci.
offer() {
    mkdir -p "$scratch/www/v2/$1/manifests"
    mkdir "$scratch/www/v2/$1/blobs"
    for blob in "$blobs"/*; do
        ln "$blob" "$scratch/www/v2/$1/blobs/sha256:${blob##*/}"
    done
    digest=$(sha256sum <"$2")
    cp "$2" "$scratch/www/v2/$1/manifests/1.oci"
    cp "$2" "$scratch/www/v2/$1/manifests/sha256:${digest%% *}"
}

#
# --inside: as process 1 of its own namespaces, still with the machine's files.
#

enter_folder() {
    mount -t tmpfs -o mode=755 tmpfs "$scratch/root"
    cd "$scratch/root"
    mkdir upper work new
    mount -t overlay -o "lowerdir=$folder,upperdir=upper,workdir=work" overlay new
    mkdir -p new/test/t new/old
    # In memory, because programs in it may need another file system than an
    # overlay.
    mount -t tmpfs -o mode=755 tmpfs new/test
    mkdir new/test/checkout new/test/t
    cp -a "$checkout/tests" new/test/checkout/
    cp "$SNAPSHOTTER" new/test/snapshotter
    cp "$scratch/cri.program" new/test/cri
    cp "$BUSYBOX" new/test/busybox
    cp -a "$scratch/www" "$scratch/httpd.conf" "$scratch/image.tar" new/test/t/
    for kind in image writable; do
        truncate -s 1500M "new/test/t/$kind.ext4"
        mkfs.ext4 -q -F -m 0 "new/test/t/$kind.ext4"
        cp --sparse=always "new/test/t/$kind.ext4" new/test/t/empty.ext4
        mkdir "new/test/t/$kind"
        mount_file "new/test/t/$kind.ext4" "new/test/t/$kind"
    done
    mount -t proc proc new/proc
    mount --rbind /dev new/dev
    mount --rbind /sys new/sys
    mount -t tmpfs -o mode=755 tmpfs new/run
    mount -t tmpfs tmpfs new/tmp
    cd new
    pivot_root . old
    umount -l /old
    # The machine's environment is not used here.
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root CGROUP="$cgroup" CLIENTS="${CLIENTS-}" RELEASE="${folder##*debian-}" \
        sh /test/checkout/tests/clients/in-debian.sh
}

#
# The script as it is called.
#

clean_up() {
    # The processes that were in them have ended.
    rm -rf --one-file-system "$folder.new"
    find /sys/fs/cgroup -depth -type d -path "*/${scratch##*/}*" -exec rmdir {} + 2>/dev/null || :
}

main() {
    release=$1
    folder=$checkout/target/tools/debian-$release
    SNAPSHOTTER=${SNAPSHOTTER:-$checkout/target/release/overlay-read-write-splitting-snapshotter}
    find_builder
    find_busybox
    make_scratch
    make_folder
    build_cri
    make_registry
    mkdir "$scratch/root"
    export SNAPSHOTTER BUSYBOX
    # With a network of their own, the registry's port is free.
    run_job_in_namespaces unshare --net sh "$checkout/tests/clients/debian.sh" --inside "$scratch" "$folder"
}

case ${1-} in
trixie | unstable) main "$1" ;;
--inside)
    scratch=$2
    folder=$3
    cgroup=/${scratch##*/}
    enter_folder
    ;;
*) die "usage: sudo sh tests/clients/debian.sh trixie|unstable" ;;
esac
