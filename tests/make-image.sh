#!/bin/sh
# Makes a small OCI image archive from the machine's static busybox.
#
#     sh tests/make-image.sh OUT.tar [NAME]
#
# NAME is what `ctr images import` calls the image; without it,
# docker.io/library/split-test:latest. The image runs /bin/sh.
#
# Five layers, each of which tests another ability of a snapshotter:
#
#   1  busybox and its applets, /etc, directories with unusual modes and owners
#   2  adds      /opt/app/added.txt  /opt/app/sub/deep.txt
#                /opt/data/payload (1 MiB)  /opt/data/passing.txt
#   3  deletes   /etc/obsolete.conf (of layer 1)  /srv/old (a directory of
#                layer 1)  /opt/data/passing.txt (of layer 2)
#   4  empties   /opt/app (opaque) and puts only.txt there
#   5  replaces  /etc/motd; adds /opt/tool/first and second, one file with two
#                names, and /opt/tool/setuid, mode 4755
#
# The same busybox gives the same archive, byte for byte: times, order and
# owners are fixed. No root is needed: tar gets owners and modes as options, so
# the packed files need not have them.
#
# Environment:
#   BUSYBOX      the static busybox to pack, instead of the one on PATH
#   GZIP_LAYERS  1: compress the layers, so that their digests in the archive
#                and those of their contents differ, as in most real images

set -eu

die() {
    echo "make-image.sh: $*" >&2
    exit 1
}

case $# in
1 | 2) ;;
*) die "usage: make-image.sh OUT.tar [NAME]" ;;
esac
out=$1
name=${2:-docker.io/library/split-test:latest}
case $name in
'' | *[!A-Za-z0-9._:/@-]*) die "not an image name: '$name'" ;;
esac
case $out in
*/) die "not a file name: '$out'" ;;
esac

# Sorting, and the output of tar and ldd, must not depend on the user's
# language.
LC_ALL=C
export LC_ALL
# Options for tar in the environment would change the archive.
unset TAR_OPTIONS
# The modes come from the calls of `put` below, but the archive itself has to be
# readable for all users.
umask 022

busybox=${BUSYBOX:-$(command -v busybox || true)}
[ -n "$busybox" ] || die "no busybox found; install Debian's busybox-static"
[ -x "$busybox" ] || die "$busybox cannot be executed"
# A container has none of the host's libraries. ldd fails on a static program.
if ldd "$busybox" >/dev/null 2>&1; then
    die "$busybox needs shared libraries; install Debian's busybox-static," \
        "or name a static one in BUSYBOX"
fi

# The name of this machine's architecture in Go, and so in containerd. On a
# 32-bit Debian with a 64-bit kernel, dpkg's answer counts.
machine=$(dpkg --print-architecture 2>/dev/null || uname -m)
variant=
case $machine in
amd64 | x86_64) arch=amd64 ;;
arm64 | aarch64) arch=arm64 ;;
armhf | armv7l) arch=arm variant=v7 ;;
i386 | i686) arch=386 ;;
ppc64el | ppc64le) arch=ppc64le ;;
riscv64 | s390x) arch=$machine ;;
*) die "no OCI name known for the architecture $machine" ;;
esac
platform="\"architecture\":\"$arch\",\"os\":\"linux\""
[ -z "$variant" ] || platform="$platform,\"variant\":\"$variant\""

# 2024-01-01, in the forms for tar and JSON.
epoch=1704067200
created=2024-01-01T00:00:00Z

work=
part=
cleanup() {
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$part" ] || rm -f "$part"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

work=$(mktemp -d "${TMPDIR:-/tmp}/make-image.XXXXXX")
tree=$work/tree
layer=$work/layer.tar
image=$work/image
blobs=$image/blobs/sha256
mkdir -p "$blobs"

# JSON lists that grow with each layer.
layers=
diff_ids=
history=

# put MODE UID GID PATH...: adds paths of the tree to the layer, in this order
# and without what is below them. Two names of one file become a hard link
# only if one call names both.
put() {
    mode=$1 uid=$2 gid=$3
    shift 3
    tar --append --file="$layer" --format=ustar --no-recursion \
        --numeric-owner --owner="$uid" --group="$gid" --mode="$mode" \
        --mtime="@$epoch" --directory="$tree" -- "$@"
}

# folder MODE UID GID PATH...: makes directories and adds them.
folder() {
    mode=$1 uid=$2 gid=$3
    shift 3
    for path in "$@"; do
        mkdir -p "$tree/$path"
    done
    put "$mode" "$uid" "$gid" "$@"
}

# text PATH WORDS...: an ordinary file of root's with one line of text.
text() {
    path=$1
    shift
    echo "$*" >"$tree/$path"
    put 0644 0 0 "$path"
}

# store FILE: moves a file among the blobs and prints its digest.
store() {
    digest=$(sha256sum <"$1")
    digest=${digest%% *}
    mv "$1" "$blobs/$digest"
    echo "$digest"
}

size() {
    stat -c %s "$1"
}

start_layer() {
    rm -rf "$tree" "$layer"
    mkdir "$tree"
}

# finish_layer COMMENT: makes a blob of the layer and lists it.
finish_layer() {
    diff_id=$(sha256sum <"$layer")
    diff_id=${diff_id%% *}
    type=application/vnd.oci.image.layer.v1.tar
    if [ "${GZIP_LAYERS:-0}" = 1 ]; then
        # -n: neither name nor time go into the file.
        gzip -n "$layer"
        mv "$layer.gz" "$layer"
        type=$type+gzip
    fi
    bytes=$(size "$layer")
    digest=$(store "$layer")
    comma=${layers:+,}
    layers="$layers$comma{\"mediaType\":\"$type\",\"digest\":\"sha256:$digest\",\"size\":$bytes}"
    diff_ids="$diff_ids$comma\"sha256:$diff_id\""
    history="$history$comma{\"created\":\"$created\",\"created_by\":\"$1\"}"
}

# Layer 1: a system.
start_layer
folder 0755 0 0 bin dev etc opt opt/app proc srv sys usr usr/bin var var/lib
folder 1777 0 0 tmp
folder 0700 0 0 root
folder 0750 1000 1000 srv/home
folder 2775 0 50 srv/shared
folder 1733 65534 65534 srv/drop
folder 0511 1234 5678 srv/odd
cp "$busybox" "$tree/bin/busybox"
put 0755 0 0 bin/busybox
# The applets in order, none twice, without busybox itself.
"$busybox" --list | grep -vx busybox | sort -u >"$work/applets"
set --
while read -r applet; do
    ln -s busybox "$tree/bin/$applet"
    set -- "$@" "bin/$applet"
done <"$work/applets"
put 0777 0 0 "$@"
# Scripts look for env here.
ln -s ../../bin/busybox "$tree/usr/bin/env"
put 0777 0 0 usr/bin/env
cat >"$tree/etc/passwd" <<'END'
root:x:0:0:root:/root:/bin/sh
user:x:1000:1000:user:/srv/home:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
END
cat >"$tree/etc/group" <<'END'
root:x:0:
staff:x:50:
user:x:1000:
nogroup:x:65534:
END
put 0644 0 0 etc/passwd etc/group
echo 'root:*:19723:0:99999:7:::' >"$tree/etc/shadow"
put 0640 0 42 etc/shadow
text etc/hostname split-test
text etc/motd 'motd of layer 1'
text etc/obsolete.conf 'deleted by layer 3'
text opt/app/base.txt 'hidden by layer 4'
folder 0755 0 0 srv/old
text srv/old/one.txt 'deleted by layer 3, with its directory'
text srv/old/two.txt 'deleted by layer 3, with its directory'
finish_layer 'busybox, /etc, directories with unusual modes and owners'

# Layer 2: more files.
start_layer
folder 0755 0 0 opt opt/app opt/app/sub
text opt/app/added.txt 'hidden by layer 4'
text opt/app/sub/deep.txt 'hidden by layer 4, with its directory'
folder 0755 0 0 opt/data
# If SIGPIPE is ignored, as under a service manager, yes prints an error because
# of head.
yes 'a line of the payload of layer 2' 2>/dev/null | head -c 1048576 >"$tree/opt/data/payload"
put 0600 1000 1000 opt/data/payload
text opt/data/passing.txt 'deleted by layer 3'
finish_layer 'adds files'

# Layer 3: deletions. An empty file .wh.NAME deletes NAME.
start_layer
folder 0755 0 0 etc
: >"$tree/etc/.wh.obsolete.conf"
put 0000 0 0 etc/.wh.obsolete.conf
folder 0755 0 0 opt opt/data
: >"$tree/opt/data/.wh.passing.txt"
put 0000 0 0 opt/data/.wh.passing.txt
folder 0755 0 0 srv
: >"$tree/srv/.wh.old"
put 0000 0 0 srv/.wh.old
finish_layer 'deletes files and a directory'

# Layer 4: an opaque directory. .wh..wh..opq hides all that lower layers have
# in the directory, and goes before the directory's new contents.
start_layer
folder 0755 0 0 opt
folder 0755 0 0 opt/app
: >"$tree/opt/app/.wh..wh..opq"
put 0000 0 0 opt/app/.wh..wh..opq
text opt/app/only.txt 'the only file here'
finish_layer 'empties and refills a directory'

# Layer 5: other content under an old name, a hard link, a setuid file.
start_layer
folder 0755 0 0 etc
text etc/motd 'motd of layer 5'
folder 0755 0 0 opt opt/tool
printf '#!/bin/sh\necho one file, two names\n' >"$tree/opt/tool/first"
ln "$tree/opt/tool/first" "$tree/opt/tool/second"
put 0755 0 0 opt/tool/first opt/tool/second
printf '#!/bin/sh\nid -u\n' >"$tree/opt/tool/setuid"
put 4755 0 0 opt/tool/setuid
finish_layer 'replaces a file, adds a hard link and a setuid file'

# The config, the manifest that names it and the layers, and the index that
# names the manifest and the image.
printf '{"created":"%s",%s,"config":{"Env":[%s],"Cmd":["/bin/sh"],"WorkingDir":"/"},"rootfs":{"type":"layers","diff_ids":[%s]},"history":[%s]}' \
    "$created" "$platform" \
    '"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","SPLIT_TEST=yes"' \
    "$diff_ids" "$history" >"$work/config"
config_bytes=$(size "$work/config")
config=$(store "$work/config")

printf '{"schemaVersion":2,"mediaType":"%s","config":{"mediaType":"%s","digest":"sha256:%s","size":%s},"layers":[%s]}' \
    application/vnd.oci.image.manifest.v1+json \
    application/vnd.oci.image.config.v1+json \
    "$config" "$config_bytes" "$layers" >"$work/manifest"
manifest_bytes=$(size "$work/manifest")
manifest=$(store "$work/manifest")

# The tag is what follows the last colon, if no slash comes after that (the
# colon of a port is before one).
tag=${name##*:}
case $tag in
*/* | "$name") tag=latest ;;
esac
printf '{"schemaVersion":2,"mediaType":"%s","manifests":[{"mediaType":"%s","digest":"sha256:%s","size":%s,"annotations":{"io.containerd.image.name":"%s","org.opencontainers.image.ref.name":"%s"},"platform":{%s}}]}' \
    application/vnd.oci.image.index.v1+json \
    application/vnd.oci.image.manifest.v1+json \
    "$manifest" "$manifest_bytes" "$name" "$tag" "$platform" >"$image/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' >"$image/oci-layout"

# Written under another name first, so that OUT is never half an archive.
part=$out.part.$$
tar --create --file="$part" --format=ustar --sort=name \
    --numeric-owner --owner=0 --group=0 --mode=u=rwX,go=rX --mtime="@$epoch" \
    --directory="$image" oci-layout index.json blobs
mv "$part" "$out"
