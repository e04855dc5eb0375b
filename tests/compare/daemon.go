package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// limit is how long a start or a stop may take.
const limit = 60 * time.Second

// places are the directories of the measurement.
type places struct {
	image, writable, binary string
}

// daemon is the measured program, and containerd's client for it.
type daemon struct {
	process *exec.Cmd
	exited  chan error
	conn    *grpc.ClientConn
	client  snapshots.Snapshotter
	// The time from exec to the notification that it is ready.
	readyAfter time.Duration
}

// startDaemon starts the program with directories of that name, which a later
// start uses again, and waits until it notifies its service manager that it is
// ready.
func startDaemon(places places, name string, flags ...string) (*daemon, error) {
	root := filepath.Join(places.image, name)
	manager := filepath.Join(places.image, name+".notify")
	_ = os.Remove(manager)
	told, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: manager, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer told.Close()

	args := append([]string{"--root-dir", root,
		"--writable-dir", filepath.Join(places.writable, name)}, flags...)
	d := &daemon{process: exec.Command(places.binary, args...), exited: make(chan error, 1)}
	d.process.Stderr = os.Stderr
	d.process.Env = append(os.Environ(), "RUST_LOG=error", "NOTIFY_SOCKET="+manager)
	begun := time.Now()
	if err := d.process.Start(); err != nil {
		return nil, err
	}
	go func() { d.exited <- d.process.Wait() }()
	if err := awaitReady(told); err != nil {
		d.kill()
		return nil, fmt.Errorf("%s is not ready: %w", places.binary, err)
	}
	d.readyAfter = time.Since(begun)

	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	d.conn, err = grpc.DialContext(ctx,
		dialer.DialAddress(filepath.Join(root, "grpc.socks")),
		grpc.WithInsecure(),
		grpc.WithContextDialer(dialer.ContextDialer),
		grpc.WithBlock())
	if err != nil {
		d.kill()
		return nil, fmt.Errorf("dial the daemon: %w", err)
	}
	d.client = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(d.conn), "rwsplit")
	return d, nil
}

// awaitReady waits for READY=1 (sd_notify(3)).
func awaitReady(told *net.UnixConn) error {
	if err := told.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	buffer := make([]byte, 4096)
	for {
		length, err := told.Read(buffer)
		if err != nil {
			return err
		}
		for _, line := range strings.Split(string(buffer[:length]), "\n") {
			if line == "READY=1" {
				return nil
			}
		}
	}
}

// stop ends it as a service manager does.
func (d *daemon) stop() error {
	_ = d.conn.Close()
	if err := d.process.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("the daemon is gone: %w", err)
	}
	select {
	case err := <-d.exited:
		return err
	case <-time.After(limit):
		d.kill()
		return fmt.Errorf("the daemon did not stop within %v", limit)
	}
}

// kill ends it if it is still running.
func (d *daemon) kill() {
	_ = d.process.Process.Kill()
}

// cpu is the processor time of all its threads, in nanoseconds;
// /proc/<pid>/stat only has hundredths of a second (clock_getcpuclockid(3)).
func (d *daemon) cpu() time.Duration {
	const scheduler = 2
	return clock(int32(^d.process.Process.Pid<<3 | scheduler))
}

// ownCPU is the processor time of this process, which includes the built-in
// snapshotter.
func ownCPU() time.Duration {
	return clock(unix.CLOCK_PROCESS_CPUTIME_ID)
}

func clock(id int32) time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(id, &now); err != nil {
		return 0
	}
	return time.Duration(now.Nano())
}

// memory is what the program takes, in MiB: VmRSS, RssAnon or VmHWM (proc(5)).
func (d *daemon) memory(field string) (float64, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", d.process.Process.Pid))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) > 1 && words[0] == field+":" {
			kib, err := strconv.ParseFloat(words[1], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no line %s", file.Name(), field)
}
