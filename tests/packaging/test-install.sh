#!/bin/sh
# Tests install.sh of the archive for this machine, in the sandbox: installing,
# upgrading and removing, below DESTDIR for systemd and for real under OpenRC,
# with containers' snapshots there all the time.
#
#     sandbox.sh test-install.sh
set -eu

program=overlay-read-write-splitting-snapshotter
root=/var/lib/containerd/tech.imvictor.containerd.$program

fail() {
    echo "test-install.sh: $*" >&2
    ! [ -s "/var/log/$program.log" ] || tail -n 20 "/var/log/$program.log" >&2
    exit 1
}

# expect TEXT COMMAND...: the command succeeds and prints TEXT.
expect() {
    text=$1
    shift
    said=$("$@" 2>&1) || fail "'$*' failed: $said"
    case $said in
    *"$text"*) ;;
    *) fail "'$*' does not say '$text', but: $said" ;;
    esac
}

cd /tmp
tar xzf /sandbox/dist/$program-*-"$(uname -m)".tar.gz
archive=$(echo /tmp/$program-*)

#
# systemd, below DESTDIR.
#
DESTDIR=/tmp/systemd
export DESTDIR
unit=$DESTDIR/usr/local/lib/systemd/system/$program.service
wants=$DESTDIR/etc/systemd/system/multi-user.target.wants/$program.service
default=$DESTDIR/etc/default/$program

expect "is installed" "$archive/install.sh" --service systemd
for path in "$DESTDIR/usr/local/bin/$program" "$unit" "$default" \
    "$DESTDIR/usr/local/share/man/man8/$program.8" \
    "$DESTDIR/usr/local/share/$program/LICENSE" "$DESTDIR/etc/modprobe.d/$program.conf"; do
    [ -f "$path" ] || fail "$path is not there"
done
[ -L "$wants" ] || fail "the unit is not enabled"
timer=$DESTDIR/usr/local/lib/systemd/system/$program-check.timer
for path in "$timer" "${timer%.timer}.service"; do
    [ -f "$path" ] || fail "$path is not there"
done
[ ! -e "$DESTDIR/etc/systemd/system/timers.target.wants" ] || fail "the timer is on by itself"
systemctl --root="$DESTDIR" --quiet enable "$program-check.timer"
[ -x "$DESTDIR/usr/local/bin/$program" ] || fail "the program cannot be run"
find "$DESTDIR" -type f -exec md5sum {} + | sort >first
expect "is installed" "$archive/install.sh" --service systemd
find "$DESTDIR" -type f -exec md5sum {} + | sort >second
cmp -s first second || fail "installing twice is not the same as once: $(diff first second)"

# Disabled services and changed settings stay.
rm "$wants"
echo 'OPTIONS="--reserve 1G"' >>"$default"
echo '# of the next version' >>"$archive/systemd/$program.default"
echo '# of the next version' >>"$archive/systemd/$program.service"
expect "was changed and stays" "$archive/install.sh" --service systemd
[ ! -e "$wants" ] || fail "an upgrade enables the unit that was disabled"
grep -q 'reserve 1G' "$default" || fail "an upgrade has overwritten what was changed"
grep -q 'next version' "$unit" || fail "an upgrade has kept the old unit"
expect "stays" "$archive/install.sh" uninstall --service systemd
left=$(cd "$DESTDIR" && find . -type f)
[ "$left" = "./etc/default/$program" ] || fail "uninstall leaves: $left"
# Unchanged settings do not.
rm "$default"
expect "is installed" "$archive/install.sh" --service systemd
echo '# of the version after' >>"$archive/systemd/$program.default"
expect "is installed" "$archive/install.sh" --service systemd
grep -q 'version after' "$default" || fail "an upgrade has kept an old configuration"

# Another program of that name, such as the Go original, stays beside it and comes back.
expect "removed" "$archive/install.sh" uninstall --service systemd
echo original >"$DESTDIR/usr/local/bin/$program"
expect "kept as /usr/local/bin/$program.before" "$archive/install.sh" --service systemd
cmp -s "$archive/$program" "$DESTDIR/usr/local/bin/$program" || fail "the original stays in the way"
expect "is installed" "$archive/install.sh" --service systemd
expect "that was there before" "$archive/install.sh" uninstall --service systemd
[ "$(cat "$DESTDIR/usr/local/bin/$program")" = original ] || fail "the original does not come back"
# A copy that somebody else has made is neither overwritten nor taken for that program.
echo mine >"$DESTDIR/usr/local/bin/$program.before"
! said=$("$archive/install.sh" --service systemd 2>&1) || fail "a copy of the administrator's is overwritten"
case $said in *"which exists"*) ;; *) fail "the refusal says: $said" ;; esac
[ "$(cat "$DESTDIR/usr/local/bin/$program")" = original ] || fail "a refused installation replaces a program"
rm "$DESTDIR/usr/local/bin/$program"
expect "is installed" "$archive/install.sh" --service systemd
expect "removed" "$archive/install.sh" uninstall --service systemd
[ "$(cat "$DESTDIR/usr/local/bin/$program.before")" = mine ] || fail "the administrator's copy is gone"
rm "$DESTDIR/usr/local/bin/$program.before"
expect "is installed" "$archive/install.sh" --service systemd

# The service waits for directories that were moved.
sed -i 's#^OPTIONS=.*#OPTIONS="--root-dir=/mnt/big/s --writable-dir /mnt/ssd/s"#' "$default"
drop_in=$DESTDIR/etc/systemd/system/$program.service.d/10-mounts.conf
expect '' "$archive/install.sh" --service systemd
grep -qx 'RequiresMountsFor=/mnt/big/s' "$drop_in" || fail "no drop-in: $(cat "$drop_in")"
grep -qx 'After=mnt-ssd-s.mount mnt-ssd.mount mnt.mount' "$drop_in" || fail "$(cat "$drop_in")"
sed -i 's#^OPTIONS=.*#OPTIONS=""#' "$default"
expect '' "$archive/install.sh" --service systemd
[ ! -e "$drop_in" ] || fail "the drop-in has outlived its directories"
expect "removed" "$archive/install.sh" uninstall --service systemd
expect "removed" "$archive/install.sh" uninstall --service systemd

# systemd does not look below this prefix. The prefix has to be given only once.
expect "is installed" env PREFIX=/opt "$archive/install.sh" --service systemd
[ "$(readlink "$wants")" = "/etc/systemd/system/$program.service" ] ||
    fail "the unit is not enabled: $(readlink "$wants")"
grep -q "^ExecStart=/opt/bin/$program " "$DESTDIR/etc/systemd/system/$program.service" ||
    fail "the unit does not start the program in /opt"
grep -q "sh /opt/share/$program/disks.sh" "$default" || fail "the settings name another disks.sh"
[ -x "$DESTDIR/opt/bin/rwsplit" ] || fail "rwsplit leads nowhere"
expect "is installed" "$archive/install.sh" --service systemd
[ ! -e "$DESTDIR/usr/local/bin/$program" ] || fail "an upgrade goes to another prefix"
! said=$(PREFIX=/srv "$archive/install.sh" --service systemd 2>&1) || fail "a second prefix is taken"
case $said in
*"it is installed in /opt, not in /srv"*) ;;
*) fail "a second prefix: $said" ;;
esac
expect "removed" "$DESTDIR/opt/share/$program/install.sh" uninstall --service systemd
left=$(cd "$DESTDIR" && find . -type f -o -type l)
[ -z "$left" ] || fail "uninstall of /opt leaves: $left"
expect "is installed" env PREFIX=/opt "$archive/install.sh" --service systemd
expect "removed" "$archive/install.sh" uninstall --service systemd
left=$(cd "$DESTDIR" && find . -type f -o -type l)
[ -z "$left" ] || fail "uninstall of /opt from the archive leaves: $left"

# With a read-only /usr, the error names PREFIX, and nothing is changed.
mkdir -p "$DESTDIR/usr"
mount -t tmpfs -o ro tmpfs "$DESTDIR/usr"
! said=$("$archive/install.sh" --service systemd 2>&1) || fail "a read-only /usr is installed to"
case $said in
*PREFIX=/opt*) ;;
*) fail "a read-only /usr: $said" ;;
esac
left=$(cd "$DESTDIR" && find . -type f -o -type l)
[ -z "$left" ] || fail "a refused install leaves: $left"
expect "is installed" env PREFIX=/opt "$archive/install.sh" --service systemd
expect "removed" "$archive/install.sh" uninstall --service systemd
umount "$DESTDIR/usr"

# A service that could not be enabled is enabled by the next run.
mkdir -p "$DESTDIR/etc/systemd/system"
echo in the way >"$DESTDIR/etc/systemd/system/multi-user.target.wants"
! said=$("$archive/install.sh" --service systemd 2>&1) || fail "it cannot be enabled, and says nothing"
rm "$DESTDIR/etc/systemd/system/multi-user.target.wants"
expect "is installed" "$archive/install.sh" --service systemd
[ -L "$wants" ] || fail "a second run does not enable what the first could not"
# Another program of that name stays.
rm "$DESTDIR/usr/local/bin/rwsplit"
echo other >"$DESTDIR/usr/local/bin/rwsplit"
expect "stays" "$archive/install.sh" --service systemd
expect "removed" "$archive/install.sh" uninstall --service systemd
[ "$(cat "$DESTDIR/usr/local/bin/rwsplit")" = other ] || fail "another program has gone"
unset DESTDIR
echo "install.sh: systemd"

#
# OpenRC, for real.
#
# The packages are only unpacked, because installing them would replace this
# machine's init. /lib and /sbin are links.
apt-get -q download openrc librc1 libeinfo1 logrotate libpopt0 >/dev/null 2>&1 ||
    fail "openrc and logrotate cannot be downloaded"
for deb in /tmp/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar --extract --keep-directory-symlink --directory /
done
# The state after a boot, without starting this machine's services.
for directory in daemons exclusive failed hotplugged inactive options scheduled started \
    starting stopping tmp wasinactive; do
    mkdir -p "/run/openrc/$directory"
done
touch /run/openrc/softlevel
printf 'rc_provide="localmount net"\nrc_sys=""\n' >>/etc/rc.conf
socket=$root/grpc.socks
sh /sandbox/tests/packaging/build-client.sh /tmp/client

pid() {
    pgrep -x -f "/usr/local/bin/$program.*"
}

expect "is installed" "$archive/install.sh" --service openrc
[ -L "/etc/runlevels/default/$program" ] || fail "the service is in no runlevel"
# After the start, the daemon serves.
[ -S "$socket" ] || fail "rc-service came back before the daemon served"
/tmp/client "$socket" once || fail "it does not serve"
upper=$(/tmp/client "$socket" prepare container)
echo written >"$upper/file"
first=$(pid)

# An upgrade, while there is a container.
expect "is installed" "$archive/install.sh" --service openrc
[ -S "$socket" ] || fail "rc-service came back before the daemon served"
second=$(pid)
[ "$first" != "$second" ] || fail "an upgrade has not started the new program"
[ "$(cat "$upper/file")" = written ] || fail "an upgrade has lost data"
/tmp/client "$socket" commit layer container || fail "it does not serve after an upgrade"

# The monthly check is cron's once it is copied. There is no containerd here, as it
# says.
cp "/usr/local/share/$program/check.monthly" /tmp/check-monthly
! said=$(/tmp/check-monthly 2>&1) || fail "a check without containerd succeeds"
case $said in
*"check that containerd is running"*) ;;
*) fail "the monthly check says: $said" ;;
esac

# OpenRC notices the end of the daemon, however often it happens.
for _ in 1 2 3 4 5; do
    expect "" rc-service "$program" restart
    expect "started" rc-service "$program" status
done

# A daemon that ends is started again, even if it was asked to end.
for signal in KILL TERM; do
    second=$(pid)
    kill -"$signal" "$second"
    tries=150
    until pid >/dev/null && [ "$(pid)" != "$second" ] && /tmp/client "$socket" once; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || fail "a daemon that died of SIG$signal is not started again"
        sleep 0.1
    done 2>/dev/null
done
# SIGHUP does not end it.
second=$(pid)
kill -HUP "$second"
tries=50
until grep -q 'SIGHUP is ignored' "/var/log/$program.log"; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "the log has nothing of SIGHUP"
    sleep 0.1
done
[ "$(pid)" = "$second" ] || fail "SIGHUP has ended the daemon"
/tmp/client "$socket" once || fail "it does not serve after SIGHUP"

# The log continues in an empty file.
logrotate --force --state /tmp/rotated "/etc/logrotate.d/$program" || fail "logrotate"
gzip -dc "/var/log/$program.log.1.gz" | grep -q 'SIGHUP is ignored' || fail "nothing was rotated"
[ ! -s "/var/log/$program.log" ] || fail "the log is not empty: $(cat "/var/log/$program.log")"
kill -HUP "$second"
tries=50
until [ -s "/var/log/$program.log" ]; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || fail "the log does not go on after it was rotated"
    sleep 0.1
done
[ "$(tr -d '\000' <"/var/log/$program.log" | wc -l)" -eq 1 ] || fail "the log is not what follows"
[ "$(wc -c <"/var/log/$program.log")" -lt 1000 ] || fail "the log has a hole"

expect "removed" "/usr/local/share/$program/install.sh" uninstall --service openrc
! pid >/dev/null || fail "uninstall leaves the daemon running"
for path in "/etc/init.d/$program" "/etc/conf.d/$program" "/etc/logrotate.d/$program" \
    "/usr/local/bin/$program"; do
    [ ! -e "$path" ] || fail "uninstall leaves $path"
done
[ "$(cat "$upper/file")" = written ] || fail "uninstall has touched data"
echo "install.sh: OpenRC"
