#!/bin/sh
# The Debian package for this machine, in the sandbox: installing, upgrading
# with a changed configuration file, removing, purging.
#
#     sandbox.sh test-deb.sh
set -eu

program=overlay-read-write-splitting-snapshotter
machine=$(dpkg --print-architecture)
default=/etc/default/$program
wants=/etc/systemd/system/multi-user.target.wants/$program.service

fail() {
    echo "test-deb.sh: $*" >&2
    exit 1
}

quiet() {
    said=$("$@" 2>&1 </dev/null) || fail "'$*' failed: $said"
}

deb=$(echo /sandbox/dist/${program}_*_"$machine".deb)
root=/var/lib/containerd/tech.imvictor.containerd.$program

# Before the disks are chosen, the daemon does not start in the bare directory.
quiet dpkg -i "$deb"
case $said in
*"choose its disks first"*) ;;
*) fail "it does not say that the disks have to be chosen: $said" ;;
esac
[ ! -L "$wants" ] || fail "the unit is enabled, and no disk was chosen"
systemctl --quiet enable "$program"
[ -L "$wants" ] || fail "the unit cannot be enabled"
quiet dpkg -P "$program"
# A mount there means that a disk was chosen.
mkdir -p "$root"
mount -t tmpfs tmpfs "$root"
quiet dpkg -i "$deb"
[ -L "$wants" ] || fail "the unit is not enabled, and a disk is mounted"
quiet dpkg -P "$program"
umount "$root"
# Settings with other directories, as an earlier package has left them.
echo 'OPTIONS="--root-dir /mnt/a"' >"$default"
quiet dpkg --force-confold -i "$deb"
[ -L "$wants" ] || fail "the unit is not enabled, and directories are set"
quiet dpkg -P "$program"

mkdir -p "$root/snapshots"
quiet dpkg -i "$deb"
[ "$(rwsplit --version)" = "$($program --version)" ] || fail "there is no rwsplit"
man -w rwsplit >/dev/null || fail "there is no man page rwsplit"
bash -n /usr/share/bash-completion/completions/$program || fail "no completion for bash"
[ "$($program --version)" = "$program $(dpkg-query -W -f '${Version}' $program)" ] ||
    fail "the package's version is not the program's: $($program --version)"
[ -L "$wants" ] || fail "the unit is not enabled"
said=$(systemd-analyze verify "/usr/lib/systemd/system/$program.service" 2>&1) || fail "$said"
[ -z "$said" ] || fail "systemd-analyze verify: $said"
said=$(systemd-analyze verify "/usr/lib/systemd/system/$program-check.timer" 2>&1) || fail "$said"
[ -z "$said" ] || fail "systemd-analyze verify: $said"
timer_wants=/etc/systemd/system/timers.target.wants/$program-check.timer
[ ! -L "$timer_wants" ] || fail "the timer is on by itself"
systemctl --quiet enable "$program-check.timer"
quiet dpkg --verify "$program"
[ -z "$said" ] || fail "dpkg --verify: $said"
man -w "$program" >/dev/null || fail "there is no man page"

# A later version, which also changes the configuration file.
dpkg-deb -R "$deb" /tmp/next
sed -i 's/^Version: .*/Version: 9999/' /tmp/next/DEBIAN/control
echo '# of the next version' >>"/tmp/next$default"
dpkg-deb --root-owner-group -b /tmp/next /tmp/next.deb >/dev/null
echo 'OPTIONS="--reserve 1G"' >>"$default"
systemctl --quiet disable "$program"
quiet dpkg --force-confdef -i /tmp/next.deb
grep -q 'reserve 1G' "$default" || fail "an upgrade has overwritten what was changed"
[ -e "$default.dpkg-dist" ] || fail "an upgrade has not left the new configuration beside the changed one"
[ ! -L "$wants" ] || fail "an upgrade enables the unit that was disabled"
# An unchanged configuration file is replaced.
quiet dpkg --force-confnew -i "$deb"
quiet dpkg -i /tmp/next.deb
grep -q 'next version' "$default" || fail "an upgrade has kept an old configuration"

quiet dpkg -r "$program"
[ ! -e "/usr/bin/$program" ] || fail "it was not removed"
[ -e "$default" ] || fail "removing has taken the configuration"
quiet dpkg -i "$deb"
quiet dpkg -P "$program"
left=$(find /etc /usr /var/lib/systemd \( -name "*$program*" -o -name '*rwsplit*' \) -not -path '/usr/src/*' -not -path '/usr/local/*')
[ -z "$left" ] || fail "purging leaves: $left"
[ -d "$root/snapshots" ] ||
    fail "purging has touched data"
echo "the Debian package installs, upgrades and goes"
