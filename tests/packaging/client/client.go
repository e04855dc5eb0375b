// A client of a running daemon, which uses containerd's own proxy client.
//
//	client SOCKET once        one layer and one container, from Prepare to Remove
//	client SOCKET many N      at least N requests from several callers at once
//
// These leave no snapshots behind, and print nothing unless they fail.
//
//	client SOCKET mapped                  a container with ids of its own
//	client SOCKET prepare KEY [PARENT]    prints the directory to write to
//	client SOCKET commit NAME KEY
//	client SOCKET remove KEY              and cleans up
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/pkg/dialer"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"google.golang.org/grpc"
)

const (
	// Long enough for a daemon under an emulator to start.
	dialLimit = time.Minute
	limit     = 10 * time.Minute
	callers   = 8
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: client SOCKET COMMAND [WORDS...]")
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), "test"), limit)
	defer cancel()
	dialCtx, dialCancel := context.WithTimeout(ctx, dialLimit)
	defer dialCancel()
	conn, err := grpc.DialContext(dialCtx,
		dialer.DialAddress(args[0]),
		grpc.WithInsecure(),
		grpc.WithContextDialer(dialer.ContextDialer),
		grpc.WithBlock())
	if err != nil {
		return fmt.Errorf("dial %s: %w", args[0], err)
	}
	defer conn.Close()
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "rwsplit")

	switch {
	case args[1] == "once":
		_, err = round(ctx, client, "once")
		return err
	case args[1] == "mapped":
		return mapped(ctx, client)
	case args[1] == "many" && len(args) == 3:
		requests, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return many(ctx, client, requests)
	case args[1] == "prepare" && (len(args) == 3 || len(args) == 4):
		mounts, err := client.Prepare(ctx, args[2], strings.Join(args[3:], ""))
		if err != nil {
			return err
		}
		directory, err := upper(mounts)
		fmt.Println(directory)
		return err
	case args[1] == "commit" && len(args) == 4:
		return client.Commit(ctx, args[2], args[3])
	case args[1] == "remove" && len(args) == 3:
		if err := client.Remove(ctx, args[2]); err != nil {
			return err
		}
		return client.(snapshots.Cleaner).Cleanup(ctx)
	}
	return fmt.Errorf("no such command: %s", strings.Join(args[1:], " "))
}

// mapped makes a container whose user namespace shares the image's layers. For
// that, the daemon first tries whether the kernel supports it.
func mapped(ctx context.Context, client snapshots.Snapshotter) error {
	if _, err := client.Prepare(ctx, "extract-mapped", ""); err != nil {
		return err
	}
	if err := client.Commit(ctx, "layer-mapped", "extract-mapped"); err != nil {
		return err
	}
	_, prepared := client.Prepare(ctx, "mapped", "layer-mapped", snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot/uidmapping": "0:100000:65536",
		"containerd.io/snapshot/gidmapping": "0:100000:65536",
	}))
	if prepared == nil {
		if err := client.Remove(ctx, "mapped"); err != nil {
			return err
		}
	}
	if err := client.Remove(ctx, "layer-mapped"); err != nil {
		return err
	}
	return prepared
}

// many distributes the requests to several callers.
func many(ctx context.Context, client snapshots.Snapshotter, requests int) error {
	var wait sync.WaitGroup
	failures := make(chan error, callers)
	for caller := 0; caller < callers; caller++ {
		wait.Add(1)
		go func(caller int) {
			defer wait.Done()
			done := 0
			for number := 0; done*callers < requests; number++ {
				made, err := round(ctx, client, fmt.Sprintf("%d-%d", caller, number))
				if err != nil {
					failures <- err
					return
				}
				done += made
			}
		}(caller)
	}
	wait.Wait()
	close(failures)
	return <-failures
}

// round makes a layer and a container on it, calls every method for them, and
// removes them. It returns the number of requests.
func round(ctx context.Context, client snapshots.Snapshotter, name string) (int, error) {
	unpacking, layer, container := "extract-"+name, "layer-"+name, "container-"+name
	var mounts []mount.Mount
	steps := []struct {
		what string
		do   func() error
	}{
		{"prepare a layer", func() (err error) {
			mounts, err = client.Prepare(ctx, unpacking, "")
			return err
		}},
		{"write into the layer", func() error { return write(mounts) }},
		{"stat the layer", func() error {
			return expect(ctx, client, unpacking, snapshots.KindActive)
		}},
		{"commit the layer", func() error { return client.Commit(ctx, layer, unpacking) }},
		{"stat the committed layer", func() error {
			return expect(ctx, client, layer, snapshots.KindCommitted)
		}},
		{"usage of the layer", func() error {
			usage, err := client.Usage(ctx, layer)
			if err == nil && usage.Size <= 0 {
				err = fmt.Errorf("the layer has no size")
			}
			return err
		}},
		{"prepare a container", func() (err error) {
			mounts, err = client.Prepare(ctx, container, layer)
			return err
		}},
		{"write into the container", func() error { return write(mounts) }},
		{"mounts of the container", func() error {
			_, err := client.Mounts(ctx, container)
			return err
		}},
		{"list", func() error {
			found := false
			err := client.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				found = found || info.Name == container
				return nil
			})
			if err == nil && !found {
				err = fmt.Errorf("%s is not in the list", container)
			}
			return err
		}},
		{"remove the container", func() error { return client.Remove(ctx, container) }},
		{"remove the layer", func() error { return client.Remove(ctx, layer) }},
		{"clean up", func() error {
			return client.(snapshots.Cleaner).Cleanup(ctx)
		}},
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return 0, fmt.Errorf("%s: %s: %w", name, step.what, err)
		}
	}
	// All steps except the two writes are requests.
	return len(steps) - 2, nil
}

func expect(ctx context.Context, client snapshots.Snapshotter, key string, kind snapshots.Kind) error {
	info, err := client.Stat(ctx, key)
	if err == nil && info.Kind != kind {
		err = fmt.Errorf("%s is of kind %v, not %v", key, info.Kind, kind)
	}
	return err
}

// write creates a file in the directory that the mounts would show.
func write(mounts []mount.Mount) error {
	directory, err := upper(mounts)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(directory, "file"), []byte("written\n"), 0o644)
}

// upper is the directory that receives what is written to the mounts.
func upper(mounts []mount.Mount) (string, error) {
	if len(mounts) != 1 {
		return "", fmt.Errorf("%d mounts instead of one", len(mounts))
	}
	for _, option := range mounts[0].Options {
		if strings.HasPrefix(option, "upperdir=") {
			return strings.TrimPrefix(option, "upperdir="), nil
		}
	}
	return mounts[0].Source, nil
}
