package suite

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
)

const (
	layerCount = 128
	extraCount = 8
)

// TestLongListsOfLowers mounts as many layers as an image may have together
// with host directories by containerd's own mounter, which has to shorten the
// list to what the kernel takes.
func TestLongListsOfLowers(t *testing.T) {
	ctx := context.Background()
	host := t.TempDir()
	t.Setenv("SNAPSHOTTER_FLAGS", os.Getenv("SNAPSHOTTER_FLAGS")+" --allow-lower "+host)
	snapshotter, stop, err := start(ctx, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()

	parent := ""
	for layer := 1; layer <= layerCount; layer++ {
		name := fmt.Sprintf("layer-%d", layer)
		key := "extract-" + name
		mounts, err := snapshotter.Prepare(ctx, key, parent)
		if err != nil {
			t.Fatal(err)
		}
		if err := mount.WithTempMount(ctx, mounts, func(root string) error {
			return os.WriteFile(filepath.Join(root, name), nil, 0o644)
		}); err != nil {
			t.Fatal(err)
		}
		if err := snapshotter.Commit(ctx, name, key); err != nil {
			t.Fatal(err)
		}
		parent = name
	}

	var extras []string
	for extra := 0; extra < extraCount; extra++ {
		path := filepath.Join(host, fmt.Sprintf("%s-%d", strings.Repeat("long", 60), extra))
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, fmt.Sprintf("extra-%d", extra)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		extras = append(extras, path)
	}
	labels := snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot/overlay-custom-add-lower.paths": strings.Join(extras, ":"),
	})
	prepared, err := snapshotter.Prepare(ctx, "web", parent, labels)
	if err != nil {
		t.Fatal(err)
	}
	viewed, err := snapshotter.View(ctx, "view", parent, labels)
	if err != nil {
		t.Fatal(err)
	}
	for _, mounts := range [][]mount.Mount{prepared, viewed} {
		if size := len(strings.Join(mounts[0].Options, ",")); size < 4096 {
			t.Errorf("options of %d bytes need no shortening: make them longer", size)
		}
		if err := mount.WithTempMount(ctx, mounts, func(root string) error {
			entries, err := os.ReadDir(root)
			if err == nil && len(entries) != layerCount+extraCount {
				err = fmt.Errorf("%d files are seen", len(entries))
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
}
