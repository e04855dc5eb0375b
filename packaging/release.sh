#!/bin/sh
# Makes a release in dist/: static binaries, archives, Debian packages, sums.
#
#     sudo sh packaging/release.sh [x86_64|aarch64|all]
#
# Without an argument, it makes all. It installs what is missing on a Debian 12,
# builds each binary against musl, checks that it is static and small, takes
# little memory and serves, and packs it. Two runs for one commit give the same
# bytes.

set -eu

cd "$(dirname "$0")/.."
program=overlay-read-write-splitting-snapshotter

case ${1:-all} in
all) machines="x86_64 aarch64" ;;
x86_64 | aarch64) machines=$1 ;;
*)
    echo "usage: release.sh [x86_64|aarch64|all]" >&2
    exit 2
    ;;
esac

# shellcheck source=tests/install-tools.sh
. tests/install-tools.sh
# shellcheck source=packaging/cross.sh
. packaging/cross.sh
install_tools dist
targets=
for machine in $machines; do
    targets="$targets $machine-unknown-linux-musl"
done
# $targets is a list.
# shellcheck disable=SC2086
install_cross "$PWD/target/tools" $targets

# Every file in a package has the time of the commit.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(as_builder git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

as_builder mkdir -p dist
# For tests that pack the binaries again.
as_builder touch --date="@$SOURCE_DATE_EPOCH" dist/.time
rm -f dist/SHA256SUMS
for machine in $machines; do
    target=$machine-unknown-linux-musl
    echo "dist: building for $machine; the first time this takes several minutes"
    began=$(date +%s)
    cross_build "$target"
    echo "dist: built for $machine in $(($(date +%s) - began)) s"
    binary=dist/$program-$machine
    as_builder cp "target/$target/dist/$program" "$binary"
    sh packaging/check-binary.sh "$binary" "$machine"
    as_builder sh packaging/package.sh "$binary" "$machine" dist
done
(cd dist && as_builder sh -c 'sha256sum -- *.tar.gz *.deb >SHA256SUMS')
ls -l dist
