#!/bin/sh
# Installs overlay-read-write-splitting-snapshotter from the unpacked release
# archive that this file is in, upgrades it, or removes it. Run by root:
#
#     ./install.sh [options]      installs or upgrades, and starts it
#     ./install.sh uninstall      removes it; data and changed settings stay
#
# Running containers are not touched by either. Options:
#
#     --service systemd|openrc    instead of finding out which one runs here
#     --no-start                  neither starts nor restarts anything
#     --image-device DEV ...      sets up disks as well: see disks.sh
#
# Environment:
#
#     PREFIX    where the program goes, instead of /usr/local or where it is already;
#               for a system whose /usr cannot be written to: PREFIX=/opt
#     DESTDIR   goes before every path that is written, for packages and tests;
#               nothing is started then

set -eu

program=overlay-read-write-splitting-snapshotter
here=$(cd "$(dirname "$0")" && pwd)
destdir=${DESTDIR-}

say() {
    echo "install.sh: $*"
}

die() {
    echo "install.sh: $*" >&2
    exit 1
}

# put MODE SOURCE PATH: installs a file in one step, even if a program with this
# path is running.
put() {
    mkdir -p "$destdir${3%/*}"
    cp "$2" "$destdir$3.new"
    put_new "$1" "$3"
}

# put_new MODE PATH: gives PATH.new its name. It is durable before, so that a power cut leaves
# the old file or the new one.
put_new() {
    chmod "$1" "$destdir$2.new"
    sync "$destdir$2.new" 2>/dev/null || sync
    mv -f "$destdir$2.new" "$destdir$2"
}

# put_adapted MODE SOURCE PATH: the same for a file that contains paths in
# PREFIX.
put_adapted() {
    mkdir -p "$destdir${3%/*}"
    adapt "$2" >"$destdir$3.new"
    put_new "$1" "$3"
}

adapt() {
    sed -e "s#/usr/local/bin/$program#$bin/$program#" \
        -e "s#/usr/local/share/$program#$share#" "$1"
}

# put_link NAME PATH: a link to the program's file, unless another program has that path.
put_link() {
    if [ -e "$destdir$2" ] || [ -L "$destdir$2" ]; then
        [ "$(readlink "$destdir$2")" = "$1" ] || {
            say "$2 belongs to another program, and stays"
            return 0
        }
    fi
    ln -sfn "$1" "$destdir$2"
}

# drop_link NAME PATH
drop_link() {
    [ "$(readlink "$destdir$2")" != "$1" ] || rm "$destdir$2"
}

# put_config SOURCE PATH: installs a configuration file, unless it was changed.
# $share has the version that was installed last, for comparison.
put_config() {
    installed=$share/${2##*/}.${1##*.}
    if [ ! -e "$destdir$2" ] || cmp -s "$destdir$installed" "$destdir$2"; then
        put_adapted 644 "$1" "$2"
    elif ! adapt "$1" | cmp -s - "$destdir$2"; then
        say "$2 was changed and stays; this version's own file is $installed"
    fi
    put_adapted 644 "$1" "$installed"
}

# drop_config KIND PATH
drop_config() {
    [ -e "$destdir$2" ] || return 0
    if cmp -s "$destdir$share/${2##*/}.$1" "$destdir$2"; then
        rm "$destdir$2"
    else
        say "$2 was changed and stays"
    fi
}

# installed_prefix: prints where an earlier run has put the program. The service has the
# path, and the files beside it prove that the service is this program's.
installed_prefix() {
    for file in "/etc/systemd/system/$program.service" \
        "/usr/local/lib/systemd/system/$program.service" "/etc/init.d/$program"; do
        [ -f "$destdir$file" ] || continue
        found=$(sed -n -e "s#^ExecStart=\(/.*\)/bin/$program\( .*\)\{0,1\}\$#\1#p" \
            -e "s#^command=\(/.*\)/bin/$program\$#\1#p" "$destdir$file" | tail -n 1)
        if [ -n "$found" ] && [ -f "$destdir$found/share/$program/install.sh" ]; then
            echo "$found"
            return 0
        fi
    done
}

# choose_places: PREFIX if it is set, otherwise the prefix of this file's own
# installation, otherwise that of an earlier run.
choose_places() {
    earlier=$(installed_prefix)
    prefix=${PREFIX-}
    [ -n "$prefix" ] || case $here in
    */share/"$program")
        prefix=${here%/share/"$program"}
        prefix=${prefix#"$destdir"}
        ;;
    *) prefix=${earlier:-/usr/local} ;;
    esac
    case $prefix in
    /*[!/]) ;;
    *) die "PREFIX is '$prefix', it has to be a full path such as /opt" ;;
    esac
    [ -z "$earlier" ] || [ "$earlier" = "$prefix" ] ||
        die "it is installed in $earlier, not in $prefix: leave PREFIX out, or run" \
            "$earlier/share/$program/install.sh uninstall first"
    bin=$prefix/bin
    share=$prefix/share/$program
    man=$prefix/share/man/man8
    bash=$prefix/share/bash-completion/completions
    zsh=$prefix/share/zsh/site-functions
    fish=$prefix/share/fish/vendor_completions.d
    # Under /usr/local, systemd looks in this directory for units that are neither a
    # distribution's nor the administrator's. It does not look below any other prefix.
    # Changes by `systemctl edit` are stored elsewhere.
    units=/usr/local/lib/systemd/system
    [ "$prefix" = /usr/local ] || units=/etc/systemd/system
}

# require_writable DIR: dies if no file can be created there.
require_writable() {
    above=$destdir$1
    while [ ! -d "$above" ] && [ -n "$above" ]; do
        above=${above%/*}
    done
    touch "${above:-}/.$program.new" 2>/dev/null ||
        die "cannot write to $1: if /usr is read-only here, choose another place, for example" \
            "PREFIX=/opt $0"
    rm "${above:-}/.$program.new"
}

find_service() {
    # This is how systemd's own programs find out whether it is in charge.
    if [ -d /run/systemd/system ]; then
        service=systemd
    elif [ -x /sbin/openrc-run ] || [ -x /usr/sbin/openrc-run ]; then
        service=openrc
    elif command -v systemctl >/dev/null 2>&1; then
        service=systemd
    else
        die "neither systemd nor OpenRC runs here; choose one with --service"
    fi
}

# keep_other: keeps the program of another project that has this one's path, as the Go original
# may have. The file $share/other says that $other.before is that program, and not a copy that
# the administrator has made.
keep_other() {
    other=$bin/$program
    if [ -e "$destdir$share/installed" ] || [ -e "$destdir$share/other" ] ||
        [ ! -e "$destdir$other" ] || cmp -s "$here/$program" "$destdir$other"; then
        return 0
    fi
    [ ! -e "$destdir$other.before" ] ||
        die "$other is another program, and cannot be kept as $other.before, which exists:" \
            "move one of them away"
    cp -p "$destdir$other" "$destdir$other.before"
    sync "$destdir$other.before" 2>/dev/null || sync
    mkdir -p "$destdir$share"
    : >"$destdir$share/other"
    say "$other was another program, which is kept as $other.before"
}

# give_back_other: gives that program its path again.
give_back_other() {
    if [ ! -e "$destdir$share/other" ] || [ ! -e "$destdir$bin/$program.before" ]; then
        return 0
    fi
    mv "$destdir$bin/$program.before" "$destdir$bin/$program"
    say "$bin/$program is the program again that was there before"
}

install_files() {
    keep_other
    put 755 "$here/$program" "$bin/$program"
    put_link "$program" "$bin/rwsplit"
    put 644 "$here/$program.8" "$man/$program.8"
    put_link "$program.8" "$man/rwsplit.8"
    put 644 "$here/completions/rwsplit.bash" "$bash/rwsplit"
    put_link rwsplit "$bash/$program"
    put 644 "$here/completions/rwsplit.zsh" "$zsh/_rwsplit"
    put 644 "$here/completions/rwsplit.fish" "$fish/rwsplit.fish"
    put_link rwsplit.fish "$fish/$program.fish"
    put 755 "$here/disks.sh" "$share/disks.sh"
    put 644 "$here/devices.sh" "$share/devices.sh"
    put_config "$here/modprobe.conf" "/etc/modprobe.d/$program.conf"
    # Needed to remove the program when the archive is gone.
    put 755 "$here/install.sh" "$share/install.sh"
    for file in README.md README.zh-CN.md CHANGELOG.md LICENSE; do
        put 644 "$here/$file" "$share/$file"
    done
    for file in "$here"/docs/*.md; do
        put 644 "$file" "$share/docs/${file##*/}"
    done
}

install_systemd() {
    own=/etc/systemd/system/$program.service
    [ ! -L "$destdir$own" ] || [ "$units" != "${own%/*}" ] ||
        die "$own is a link: run 'systemctl unmask $program.service' first"
    if [ -e "$destdir$own" ] && [ ! -L "$destdir$own" ] && [ "$units" != "${own%/*}" ]; then
        say "$own hides the unit of this version: remove it if you have not changed it on purpose"
    fi
    put_adapted 644 "$here/systemd/$program.service" "$units/$program.service"
    # The timer is off until it is enabled.
    put_adapted 644 "$here/systemd/$program-check.service" "$units/$program-check.service"
    put 644 "$here/systemd/$program-check.timer" "$units/$program-check.timer"
    put_config "$here/systemd/$program.default" "/etc/default/$program"
    [ -n "$destdir" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
    [ "$new" = no ] || systemctl ${destdir:+--root="$destdir"} --quiet enable "$program.service" ||
        die "$units/$program.service cannot be enabled: after that is put right, run this again"
}

start_systemd() {
    [ -d /run/systemd/system ] || return 0
    if [ "$new" = yes ]; then
        systemctl restart "$program.service" ||
            die "the service does not start: see 'journalctl -u $program'"
    else
        # A service that was stopped on purpose stays stopped.
        systemctl try-restart "$program.service" ||
            die "the service does not start again: see 'journalctl -u $program'"
    fi
}

remove_systemd() {
    if [ -z "$destdir" ] && [ -d /run/systemd/system ]; then
        systemctl --quiet stop "$program-check.timer" "$program.service" 2>/dev/null || :
    fi
    if [ -e "$destdir$units/$program-check.timer" ]; then
        systemctl ${destdir:+--root="$destdir"} --quiet disable "$program-check.timer" || :
    fi
    if [ -e "$destdir$units/$program.service" ]; then
        systemctl ${destdir:+--root="$destdir"} --quiet disable "$program.service" || :
    fi
    rm -f "$destdir$units/$program.service" "$destdir$units/$program-check.service" \
        "$destdir$units/$program-check.timer" \
        "$destdir/etc/systemd/system/$program.service.d/10-mounts.conf"
    rmdir "$destdir/etc/systemd/system/$program.service.d" 2>/dev/null || :
    drop_config default "/etc/default/$program"
    [ -n "$destdir" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
}

install_openrc() {
    put_adapted 755 "$here/openrc/$program.initd" "/etc/init.d/$program"
    # For cron, once it is copied there.
    put_adapted 755 "$here/openrc/$program.monthly" "$share/check.monthly"
    put_config "$here/openrc/$program.confd" "/etc/conf.d/$program"
    put_config "$here/openrc/$program.logrotate" "/etc/logrotate.d/$program"
    [ "$new" = yes ] || return 0
    if [ -n "$destdir" ]; then
        mkdir -p "$destdir/etc/runlevels/default"
        ln -sfn "/etc/init.d/$program" "$destdir/etc/runlevels/default/$program"
    else
        rc-update --quiet add "$program" default
    fi
}

start_openrc() {
    # Not in an image that will be booted later.
    [ -d /run/openrc ] || return 0
    if [ "$new" = yes ]; then
        rc-service "$program" start || die "the service does not start: see /var/log/$program.log"
    elif rc-service --quiet "$program" status >/dev/null 2>&1; then
        # With --nodeps, services that need this one (containerd, for example)
        # keep running. It takes two steps, because after a restart with
        # --nodeps OpenRC considers the service stopped.
        rc-service --nodeps "$program" stop
        rc-service --nodeps "$program" start ||
            die "the service does not start again: see /var/log/$program.log"
    fi
}

remove_openrc() {
    if [ -z "$destdir" ]; then
        [ ! -d /run/openrc ] || rc-service --quiet --nodeps "$program" stop >/dev/null 2>&1 || :
        rc-update --quiet del "$program" default 2>/dev/null || :
    fi
    rm -f "$destdir/etc/runlevels/default/$program" "$destdir/etc/init.d/$program"
    drop_config confd "/etc/conf.d/$program"
    drop_config logrotate "/etc/logrotate.d/$program"
}

uninstall() {
    [ -e "$destdir$bin/$program" ] || say "$bin/$program is not there; removing the other files"
    [ "$service" != systemd ] || remove_systemd
    [ "$service" != openrc ] || remove_openrc
    drop_config conf "/etc/modprobe.d/$program.conf"
    drop_link "$program" "$bin/rwsplit"
    drop_link "$program.8" "$man/rwsplit.8"
    rm -f "$destdir$bin/$program" "$destdir$man/$program.8" "$destdir$bash/rwsplit" \
        "$destdir$bash/$program" "$destdir$zsh/_rwsplit" "$destdir$fish/rwsplit.fish" \
        "$destdir$fish/$program.fish"
    give_back_other
    rm -rf "$destdir$share"
    say "removed. Images and containers stay, and so do the mounts that were set up;" \
        "containerd's configuration still names the snapshotter"
}

action=install
service=
start=yes
disks=
while [ $# -gt 0 ]; do
    case $1 in
    install | uninstall) action=$1 ;;
    --service)
        [ $# -ge 2 ] || die "--service needs systemd or openrc"
        service=$2
        shift
        ;;
    --no-start) start=no ;;
    -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    # The other options are for disks.sh. None of its words contains a blank.
    *) disks="$disks $1" ;;
    esac
    shift
done
case $service in
systemd | openrc) ;;
'') find_service ;;
*) die "--service is '$service', it has to be systemd or openrc" ;;
esac
[ -n "$destdir" ] || [ "$(id -u)" = 0 ] || die "run this script as root"
[ -z "$destdir" ] || start=no
choose_places

if [ "$action" = uninstall ]; then
    [ -z "$disks" ] || die "uninstall takes no$disks"
    uninstall
    exit 0
fi

[ -f "$here/$program" ] || die "$here is not an unpacked release archive: $program is not in it"
# Checked before anything is changed: a binary for another machine would not
# start.
[ -n "$destdir" ] || "$here/$program" --version >/dev/null ||
    die "this archive's program does not run here: is the archive for a machine like this" \
        "($(uname -m))?"
require_writable "$bin"
require_writable "$share"
# An earlier run that was interrupted is continued. If it was completed, services that
# were disabled or stopped since stay so.
new=yes
[ ! -e "$destdir$share/installed" ] || new=no
# $disks is a list.
# shellcheck disable=SC2086
[ -z "$disks" ] || DESTDIR=$destdir sh "$here/disks.sh" --check --service "$service" $disks
install_files
"install_$service"
# shellcheck disable=SC2086
DESTDIR=$destdir sh "$here/disks.sh" --service "$service" $disks
[ "$start" = no ] || "start_$service"
echo "$service" >"$destdir$share/installed"
say "$program is installed for $service; the lines that containerd's configuration needs are in" \
    "$share/README.md and $share/docs/containerd.md"
