#!/bin/sh
# Packs the binaries in dist/ a second time, elsewhere, later and with another
# umask: the bytes have to be those in dist/SHA256SUMS. (That the binaries come
# out the same is not tested here: building them again would take as long as all
# other tests. packaging/cross.sh says what makes them so.)
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
