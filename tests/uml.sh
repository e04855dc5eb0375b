#!/bin/sh
# Unpacks user-mode Linux into target/tools/uml: a Linux kernel that runs as an
# ordinary process, at the speed of the processor. Run by root on x86-64. Nothing
# is installed, and apt's own lists do not change. If it is not available, the
# script ends with 1 and the reason. The tests then emulate their machines with
# qemu, which takes longer.
#
# The package is that of Debian's unstable distribution: Debian 12's (Linux 6.1)
# needs ptrace to save floating-point registers in a form that newer kernels
# refuse, and then does not start its first process.
#
# What is in target/tools/uml:
#
#     linux, libc.so.6, ld-linux-x86-64.so.2   to be started in this directory
#     modules/VERSION/                         the kernel's modules
set -eu

cd "$(dirname "$0")/.."
out=$PWD/target/tools/uml
[ ! -d "$out" ] || exit 0

fail() {
    echo "uml.sh: $*" >&2
    exit 1
}

[ "$(uname -m)" = x86_64 ] || fail "user-mode Linux is for x86-64 only"
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keys" ] || fail "Debian's signatures cannot be verified: there is no $keys"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch" "$out.new"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$scratch/lists" "$scratch/cache" "$scratch/root"

# From where this machine's apt has its packages, and by the same proxy.
# The words in parentheses are apt's.
# shellcheck disable=SC2016
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    sed -n 's|^\(.*/debian/\{0,1\}\) [^ ]* main$|\1|p' | head -n 1)
[ -n "$mirror" ] || fail "apt has no mirror of Debian"
echo "deb [signed-by=$keys] $mirror unstable main" >"$scratch/sources"

# apt COMMAND...: apt-get, which knows of unstable and nothing else. A mirror's
# index may be older than it says that it may become.
apt() {
    apt-get -q=2 -o Dir::Etc::SourceList="$scratch/sources" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$scratch/lists" -o Dir::Cache="$scratch/cache" \
        -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Languages=none "$@"
}
if ! apt update >"$scratch/log" 2>&1 ||
    ! (cd "$scratch" && apt download user-mode-linux libc6) >>"$scratch/log" 2>&1; then
    cat "$scratch/log" >&2
    fail "the package is not to be had from $mirror"
fi
for package in "$scratch"/*.deb; do
    dpkg-deb -x "$package" "$scratch/root"
done

rm -rf "$out.new"
mkdir -p "$out.new/modules"
libraries=$scratch/root/usr/lib/x86_64-linux-gnu
cp "$libraries/libc.so.6" "$libraries/ld-linux-x86-64.so.2" "$out.new/"
(cd "$scratch/root/usr/lib/uml/modules" &&
    find . \( -path '*/kernel/fs/*' -o -path '*/drivers/block/*' -o -path '*/drivers/md/*' \
        -o -name 'modules.*' \) -type f -exec cp --parents -t "$out.new/modules" {} +)
# It needs a newer C library than Debian 12 has. A program's loader is named in the
# program: here by a path of the same length, in the directory where it is started.
LC_ALL=C sed 's|/lib64/ld-linux|./././/ld-linux|' "$scratch/root/usr/bin/linux.uml" >"$out.new/linux"
chmod 755 "$out.new/linux"

# On this machine it must be able to run a process. When the first one of all ends,
# the kernel panics and reports how it ended.
(
    cd "$out.new"
    timeout 60 setarch -R env LD_LIBRARY_PATH=. ./linux mem=64M uml_dir="$scratch/" \
        root=/dev/root rootfstype=hostfs rootflags=/ ro init=/bin/true con=null con0=null,fd:1 || :
) </dev/null >"$scratch/console" 2>&1
if ! grep -q 'Attempted to kill init! exitcode=0x00000000' "$scratch/console"; then
    tail -n 20 "$scratch/console" >&2
    fail "user-mode Linux does not run on this machine"
fi
mv "$out.new" "$out"
version=$(sed -n 's/.*Linux version \([^ ]*\).*/\1/p' "$scratch/console" | head -n 1)
echo "uml.sh: user-mode Linux $version is in target/tools/uml"
