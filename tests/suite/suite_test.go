// containerd's own snapshotter suite, run against a real daemon through the
// proxy client that containerd itself uses.
//
// Environment: SNAPSHOTTER is the binary, SNAPSHOTTER_WRITABLE an optional
// directory on another file system for what containers write, and
// SNAPSHOTTER_FLAGS optional further flags, separated by blanks.
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

const stopLimit = 15 * time.Second

func TestSnapshotter(t *testing.T) {
	testsuite.SnapshotterSuite(t, "rwsplit", start)
}

// start starts a daemon for one case. The returned function ends it, and fails
// if it does not end well.
func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	args := []string{"--root-dir", root}
	if base := os.Getenv("SNAPSHOTTER_WRITABLE"); base != "" {
		writable, err := os.MkdirTemp(base, "writable-")
		if err != nil {
			return nil, nil, err
		}
		args = append(args, "--writable-dir", writable)
	}
	args = append(args, strings.Fields(os.Getenv("SNAPSHOTTER_FLAGS"))...)

	daemon := exec.Command(os.Getenv("SNAPSHOTTER"), args...)
	daemon.Stderr = os.Stderr
	daemon.Env = append(os.Environ(), "RUST_LOG=error")
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	exited := make(chan error, 1)
	go func() { exited <- daemon.Wait() }()

	dialCtx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	conn, err := grpc.DialContext(dialCtx,
		dialer.DialAddress(filepath.Join(root, "grpc.socks")),
		grpc.WithInsecure(),
		grpc.WithContextDialer(dialer.ContextDialer),
		grpc.WithBlock())
	if err != nil {
		_ = daemon.Process.Kill()
		return nil, nil, fmt.Errorf("dial the daemon: %w", err)
	}

	stop := func() error {
		_ = conn.Close()
		if err := daemon.Process.Signal(syscall.SIGTERM); err != nil {
			return fmt.Errorf("the daemon is gone: %w", err)
		}
		select {
		case err := <-exited:
			return err
		case <-time.After(stopLimit):
			_ = daemon.Process.Kill()
			return fmt.Errorf("the daemon did not stop within %v", stopLimit)
		}
	}
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "rwsplit")
	return client, stop, nil
}
