# shellcheck shell=sh
# The caller reads $machine.
# shellcheck disable=SC2034
#
# Read by boot.sh: two ways to run a machine in the background, whose process is then
# $machine, with its console in $scratch/console and its lines for the host in
# $scratch/records. The caller sets
#
#     scratch   a directory with the disks root, test.ext4, image and writable
#     kernel    a directory with Debian's kernel package, unpacked
: "${scratch:?}" "${kernel:?}"

# start_qemu PARAMETERS DISKS: starts an emulated machine with Debian's own kernel.
# PARAMETERS are for the kernel; DISKS lists the disks ("image", "writable") that are
# there from the beginning.
start_qemu() {
    rm -f "$scratch/monitor.in" "$scratch/monitor.out"
    mkfifo "$scratch/monitor.in" "$scratch/monitor.out"
    # qemu has the disks of the volumes from the beginning, and turns each into a
    # device when it is plugged in. Nothing has to be flushed, because a machine
    # whose test has failed is not used any more.
    devices=
    for disk in $2; do
        devices="$devices -device virtio-blk-pci,drive=$disk,serial=$disk"
    done
    # It is emulated even if there is a /dev/kvm: one that can be opened may
    # still not run a machine, for example inside another virtual machine.
    # $devices is a list of words.
    # shellcheck disable=SC2086
    setpriv --pdeathsig KILL qemu-system-x86_64 -nodefaults -no-user-config -display none \
        -accel tcg,thread=multi -cpu qemu64,+rdrand -smp 2 -m 1024 \
        -kernel "$kernel"/boot/vmlinuz-* \
        -append "root=/dev/nvme0n1 mitigations=off $1" \
        -drive "if=none,id=root,format=raw,cache=unsafe,file=$scratch/root" \
        -device nvme,drive=root,serial=root \
        -drive "if=virtio,format=raw,readonly=on,file=$scratch/test.ext4" \
        -drive "if=none,id=image,format=raw,cache=unsafe,file=$scratch/image" \
        -drive "if=none,id=writable,format=raw,cache=unsafe,file=$scratch/writable" \
        $devices -no-reboot \
        -chardev "file,id=console,path=$scratch/console" -serial chardev:console \
        -chardev "file,id=records,path=$scratch/records" -serial chardev:records \
        -chardev "pipe,id=monitor,path=$scratch/monitor" -mon chardev=monitor,mode=readline \
        >"$scratch/said" 2>&1 &
    machine=$!
}

# plug_qemu DISK
plug_qemu() {
    echo "device_add virtio-blk-pci,drive=$1,serial=$1" >"$scratch/monitor.in"
}

# The name that user-mode Linux has for the disk of a volume.
uml_disk() {
    case $1 in
    image) echo "ubd2=$scratch/image" ;;
    writable) echo "ubd3=$scratch/writable" ;;
    esac
}

# start_uml PARAMETERS DISKS: as a process, see uml.sh.
start_uml() {
    disks=
    for disk in $2; do
        disks="$disks $(uml_disk "$disk")"
    done
    # Its memory is a file: in this machine's memory, if that has room for two
    # machines.
    memory=$scratch
    available=$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)
    [ "${available:-0}" -lt 4194304 ] || memory=/dev/shm
    uml=$PWD/target/tools/uml
    # A serial line is written to a descriptor without a buffer. The descriptors of
    # input are free for that, because nothing is read. 512 terminals are not created,
    # because udev would look at each. $1 and $disks are lists of words.
    # shellcheck disable=SC2086
    (
        cd "$uml" || exit
        TMPDIR=$memory exec setpriv --pdeathsig KILL setarch -R env LD_LIBRARY_PATH=. \
            ./linux mem=1024M "uml_dir=$scratch/" umid=uml root=/dev/ubda \
            "ubd0=$scratch/root" "ubd1r=$scratch/test.ext4" $disks \
            con=null ssl=null ssl0=null,fd:1 ssl1=null,fd:0 pty.legacy_count=0 $1
    ) 0>>"$scratch/records" >"$scratch/console" 2>&1 &
    machine=$!
    : >"$scratch/said"
}

# plug_uml DISK: uses the kernel's management console, a socket that takes a command
# in a packet (arch/um/drivers/mconsole.h).
plug_uml() {
    rm -f "$scratch/plug"
    perl -MSocket -e '
        my ($console, $own, $command) = @ARGV;
        socket(my $socket, AF_UNIX, SOCK_DGRAM, 0) or die "socket: $!";
        bind($socket, sockaddr_un($own)) or die "bind: $!";
        my ($magic, $version) = (0xcafebabe, 2);
        my $request = pack("L3 a512", $magic, $version, length $command, $command);
        send($socket, $request, 0, sockaddr_un($console)) or die "send: $!";
        defined recv($socket, my $reply, 1024, 0) or die "recv: $!";
        my ($error, $more, $length, $text) = unpack("L3 a*", $reply);
        die "$command: ", substr($text, 0, $length) if $error;
    ' "$scratch/uml/mconsole" "$scratch/plug" "config $(uml_disk "$1")" ||
        boot_failed "the $1 disk is not plugged in"
}
