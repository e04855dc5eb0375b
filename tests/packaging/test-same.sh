#!/bin/sh
# Packs the binaries in dist/ a second time, in another directory, later, and
# with another umask: the bytes have to match dist/SHA256SUMS. (That two builds
# give the same binaries is not tested here, because a build takes as long as
# all other tests. packaging/cross.sh says what ensures it.)
set -eu

cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
umask 077
TZ=Asia/Tokyo
SOURCE_DATE_EPOCH=$(stat -c %Y dist/.time)
export TZ SOURCE_DATE_EPOCH
for binary in dist/overlay-read-write-splitting-snapshotter-x86_64 \
    dist/overlay-read-write-splitting-snapshotter-aarch64; do
    [ -e "$binary" ] || continue
    sh packaging/package.sh "$binary" "${binary##*-}" "$scratch"
done
(cd "$scratch" && sha256sum --check --quiet --strict "$OLDPWD/dist/SHA256SUMS")
echo "the packages are the same"
