#!/bin/sh
# root.sh MANAGER OUT MODULES...: makes the root disk of a virtual machine, an ext4
# file system in the file OUT: a small Debian under MANAGER (systemd, openrc) with
# containerd. Each MODULES is a kernel's directory of modules (/lib/modules/VERSION).
# Run by root.
#
# The snapshotter is not in it. At the end of each boot it runs /test/guest.sh,
# from a disk with the label "test".
set -eu

manager=$1
out=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
bytes=1G

scratch=$(mktemp -d)
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
root=$scratch/root

case $manager in
systemd) packages=systemd-sysv,dbus ;;
openrc) packages=openrc,sysvinit-core,initscripts ;;
*)
    echo "root.sh: neither systemd nor openrc: $manager" >&2
    exit 2
    ;;
esac
packages=$packages,containerd,runc,udev,kmod,mount,e2fsprogs,procps

# The same mirror and proxy as this machine's apt. The words in parentheses are
# apt's.
# shellcheck disable=SC2016
apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 'Origin: Debian' | sort -u >"$scratch/sources"
apt-config dump | { grep '^Acquire::https\{0,1\}::Proxy' || :; } >"$scratch/options"
# shellcheck source=/dev/null
release=$(. /etc/os-release && echo "$VERSION_CODENAME")
if ! mmdebstrap --mode=root --variant=essential --include="$packages" \
    --aptopt="$scratch/options" --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$release" "$root" "$scratch/sources" >"$scratch/log" 2>&1 </dev/null; then
    tail -n 40 "$scratch/log" >&2
    exit 1
fi

# Drivers of the disks, what containers need, and quotas. With all modules, udev
# would load many, which takes an emulated processor long.
mkdir -p "$root/lib/modules"
for modules in "$@"; do
    (cd "${modules%/*}" && find "${modules##*/}" \( -name 'virtio*.ko' -o -name overlay.ko \
        -o -name 'quota_*.ko' -o -name 'modules.*' \) \
        -exec cp --parents --target-directory="$root/lib/modules" {} +)
    chroot "$root" depmod "${modules##*/}"
done
# With a machine id, systemd does not treat the next boot as the first one.
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
echo boot-test >"$root/etc/hostname"
mkdir "$root/test"
cat >"$root/etc/fstab" <<'END'
LABEL=root  /      ext4  noatime  0 1
LABEL=test  /test  ext4  ro       0 0
END
case $manager in
systemd)
    cp "$here/boot-test.service" "$root/etc/systemd/system/"
    chroot "$root" systemctl --quiet enable boot-test.service
    ;;
openrc)
    # Debian's containerd has no script for OpenRC.
    cp "$here/containerd.initd" "$root/etc/init.d/containerd"
    chmod 755 "$root/etc/init.d/containerd"
    ln -s /etc/init.d/containerd "$root/etc/runlevels/default/containerd"
    # Starts the test when login prompts appear, and not before.
    echo 'bt:2345:once:/bin/sh /test/guest.sh' >>"$root/etc/inittab"
    ;;
esac
rm -f "$out"
truncate -s "$bytes" "$out"
mkfs.ext4 -q -F -L root -d "$root" "$out"
