#!/bin/sh
# build-client.sh PATH: builds the test client, with Debian's copy of
# containerd's library.
set -eu

cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/src"
ln -s "$PWD/tests/packaging/client" "$scratch/src/client"
cd "$scratch/src/client"
GO111MODULE=off GOFLAGS='' GOPATH="$scratch:/usr/share/gocode" go build -o "$1" .
