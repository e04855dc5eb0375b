#!/bin/sh
# package.sh BINARY MACHINE DIR: packs a binary for MACHINE (x86_64, aarch64)
# with all its files into DIR, as an archive and as a Debian package. The time of
# every file in them is SOURCE_DATE_EPOCH, so the same input gives the same
# bytes. Needs no root.
set -eu

cd "$(dirname "$0")/.."
program=overlay-read-write-splitting-snapshotter
binary=$1
machine=$2
out=$3
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
: "${SOURCE_DATE_EPOCH:?}"
export SOURCE_DATE_EPOCH

case $machine in
x86_64) debian_machine=amd64 ;;
aarch64) debian_machine=arm64 ;;
*)
    echo "package.sh: no packages for $machine" >&2
    exit 1
    ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
umask 022

# put MODE SOURCE PATH
put() {
    mkdir -p "${3%/*}"
    cp "$2" "$3"
    chmod "$1" "$3"
}

# The manual page, from Markdown. groff would print "--" as two hyphens that are
# not minus signs, and cannot be searched for.
sed -e "s/@VERSION@/$version/" \
    -e "s/@DATE@/$(LC_ALL=C date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%d)/" \
    "packaging/$program.8.md" >"$scratch/page.md"
lowdown -s --out-no-smarty -tman "$scratch/page.md" >"$scratch/page.man"
sed 's/--/\\-\\-/g' "$scratch/page.man" >"$scratch/$program.8"
said=$(groff -man -ww -z "$scratch/$program.8" 2>&1)
[ -z "$said" ] || {
    echo "package.sh: the man page is not well made: $said" >&2
    exit 1
}

# The archive.
name=$program-$version-$machine
put 755 "$binary" "$scratch/$name/$program"
put 644 "$scratch/$program.8" "$scratch/$name/$program.8"
put 755 packaging/install.sh "$scratch/$name/install.sh"
put 755 packaging/disks.sh "$scratch/$name/disks.sh"
put 644 packaging/devices.sh "$scratch/$name/devices.sh"
put 644 packaging/modprobe.conf "$scratch/$name/modprobe.conf"
for file in docs/*.md; do
    put 644 "$file" "$scratch/$name/$file"
done
for file in packaging/completions/*; do
    put 644 "$file" "$scratch/$name/completions/${file##*/}"
done
for file in README.md README.zh-CN.md CHANGELOG.md LICENSE systemd/"$program".service \
    systemd/"$program"-check.service systemd/"$program"-check.timer \
    systemd/"$program".default openrc/"$program".confd openrc/"$program".logrotate \
    openrc/"$program".monthly; do
    put 644 "$file" "$scratch/$name/$file"
done
put 755 "openrc/$program.initd" "$scratch/$name/openrc/$program.initd"
find "$scratch/$name" -type d -exec chmod 755 {} +
tar --create --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    --format=ustar --directory "$scratch" "$name" | gzip -9 -n >"$out/$name.tar.gz"

# The Debian package. It is for systemd only: Debian would treat OpenRC's script
# as one of sysvinit.
deb=$scratch/deb
put 755 "$binary" "$deb/usr/bin/$program"
mkdir -p "$deb/usr/lib/systemd/system"
for unit in "$program.service" "$program-check.service" "$program-check.timer"; do
    sed "s#/usr/local/bin/#/usr/bin/#" "systemd/$unit" >"$deb/usr/lib/systemd/system/$unit"
done
put 644 "systemd/$program.default" "$deb/etc/default/$program"
put 755 packaging/disks.sh "$deb/usr/share/$program/disks.sh"
put 644 packaging/devices.sh "$deb/usr/share/$program/devices.sh"
put 644 packaging/modprobe.conf "$deb/usr/lib/modprobe.d/$program.conf"
put 644 "openrc/$program.initd" "$deb/usr/share/$program/openrc/$program.initd"
put 644 "openrc/$program.confd" "$deb/usr/share/$program/openrc/$program.confd"
put 644 "openrc/$program.logrotate" "$deb/usr/share/$program/openrc/$program.logrotate"
put 644 "$scratch/$program.8" "$deb/usr/share/man/man8/$program.8"
gzip -9 -n "$deb/usr/share/man/man8/$program.8"
ln -s "$program.8.gz" "$deb/usr/share/man/man8/rwsplit.8.gz"
ln -s "$program" "$deb/usr/bin/rwsplit"
completions=packaging/completions/rwsplit
put 644 $completions.bash "$deb/usr/share/bash-completion/completions/rwsplit"
ln -s rwsplit "$deb/usr/share/bash-completion/completions/$program"
put 644 $completions.zsh "$deb/usr/share/zsh/vendor-completions/_rwsplit"
put 644 $completions.fish "$deb/usr/share/fish/vendor_completions.d/rwsplit.fish"
ln -s rwsplit.fish "$deb/usr/share/fish/vendor_completions.d/$program.fish"
for file in README.md README.zh-CN.md docs/*.md; do
    put 644 "$file" "$deb/usr/share/doc/$program/$file"
done
put 644 CHANGELOG.md "$deb/usr/share/doc/$program/changelog"
gzip -9 -n "$deb/usr/share/doc/$program/changelog"
put 644 LICENSE "$deb/usr/share/doc/$program/copyright"
for file in packaging/deb/postinst packaging/deb/prerm packaging/deb/postrm; do
    put 755 "$file" "$deb/DEBIAN/${file##*/}"
done
echo "/etc/default/$program" >"$deb/DEBIAN/conffiles"
sed -e "s/@VERSION@/$version/" -e "s/@MACHINE@/$debian_machine/" \
    -e "s/@SIZE@/$(find "$deb/etc" "$deb/usr" -type f -printf '%s\n' |
        awk '{ kib += int(($1 + 1023) / 1024) } END { print kib }')/" \
    packaging/deb/control >"$deb/DEBIAN/control"
(cd "$deb" && find etc usr -type f -exec md5sum {} + | LC_ALL=C sort -k 2 >DEBIAN/md5sums)
find "$deb" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
# With one thread, because several would divide the data by the number of
# processors.
dpkg-deb --root-owner-group -Zxz --threads-max=1 --build "$deb" \
    "$out/${program}_${version}_$debian_machine.deb" >/dev/null
