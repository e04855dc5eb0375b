package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/errdefs"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/gogo/protobuf/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Lengths of the chains of layers below snapshots; the middle one is a usual
// image.
const (
	shortChain = 1
	usualChain = 20
	longChain  = 128
)

// labelRef is the label that containerd gives a layer that it unpacks.
const labelRef = "containerd.io/snapshot.ref"

// callers is the number of simultaneous callers.
const callers = 8

// requests measures the requests in the life of a container.
func (b *bench) requests(daemon *daemon) error {
	for _, length := range []int{shortChain, usualChain, longChain} {
		for _, s := range []*side{b.theirs, b.ours} {
			if err := b.chain(s, length); err != nil {
				return err
			}
		}
	}
	for _, length := range []int{shortChain, usualChain, longChain} {
		if err := b.prepares(length, ""); err != nil {
			return err
		}
	}
	if err := b.views(""); err != nil {
		return err
	}
	if err := b.removes(""); err != nil {
		return err
	}
	if err := b.bare(daemon); err != nil {
		return err
	}
	if err := b.reads(""); err != nil {
		return err
	}
	if err := b.usageOfTree(); err != nil {
		return err
	}
	return b.cleanup()
}

func (b *bench) prepares(length int, where string) error {
	for _, count := range []int{1, callers} {
		t := b.writing(fmt.Sprintf("Prepare, chain of %d%s", length, where), count)
		t.call = func(s *side, call int) error {
			_, err := s.snapshotter.Prepare(b.ctx, key(call), chainName(length))
			return err
		}
		t.after = b.removeAll(t.calls)
		if where == "" {
			t.goal = goal{ratioAtMost: 0.7}
			if count > 1 {
				t.goal = goal{speedAtLeast: 2}
			}
		}
		if err := b.compare(t); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) views(where string) error {
	for _, count := range []int{1, callers} {
		t := b.writing("View"+where, count)
		t.call = func(s *side, call int) error {
			_, err := s.snapshotter.View(b.ctx, key(call), chainName(usualChain))
			return err
		}
		t.after = b.removeAll(t.calls)
		if where == "" && count == 1 {
			t.goal = goal{ratioAtMost: 0.35}
		}
		if err := b.compare(t); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) removes(where string) error {
	for _, count := range []int{1, callers} {
		t := b.writing("Remove"+where, count)
		t.before = func(s *side, call int) error {
			_, err := s.snapshotter.Prepare(b.ctx, key(call), chainName(usualChain))
			return err
		}
		t.call = func(s *side, call int) error {
			return s.snapshotter.Remove(b.ctx, key(call))
		}
		t.after = b.clean
		if where == "" && count == 1 {
			t.goal = goal{ratioAtMost: 1.2}
		}
		if err := b.compare(t); err != nil {
			return err
		}
	}
	return nil
}

// bare measures a call that the server answers without any of the daemon's
// code: there is no method of that name.
func (b *bench) bare(daemon *daemon) error {
	for _, count := range []int{1, callers} {
		err := b.alone(task{
			name: "a bare gRPC call", callers: count, calls: b.size.reads, rounds: b.size.rounds,
			call: func(*side, int) error {
				err := daemon.conn.Invoke(b.ctx, "/bench.Bare/Call", &types.Empty{}, &types.Empty{})
				if status.Code(err) == codes.Unimplemented {
					return nil
				}
				return fmt.Errorf("a method that does not exist: %w", err)
			},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// reads measures the requests that change nothing, for a container that has
// written nothing.
func (b *bench) reads(where string) error {
	const container = "reads"
	for _, s := range []*side{b.theirs, b.ours} {
		if _, err := s.snapshotter.Prepare(b.ctx, container, chainName(usualChain)); err != nil {
			return err
		}
	}
	for _, count := range []int{1, callers} {
		limit := goal{}
		if where == "" && count == 1 {
			limit = goal{atMost: 0.1}
		}
		tasks := []task{
			{name: "Stat", goal: limit, call: func(s *side, _ int) error {
				_, err := s.snapshotter.Stat(b.ctx, container)
				return err
			}},
			{name: "Mounts", goal: limit, call: func(s *side, _ int) error {
				_, err := s.snapshotter.Mounts(b.ctx, container)
				return err
			}},
			{name: "Usage, empty", call: func(s *side, _ int) error {
				_, err := s.snapshotter.Usage(b.ctx, container)
				return err
			}},
		}
		for _, t := range tasks {
			t.name += where
			t.callers, t.calls, t.rounds = count, b.size.reads, b.size.rounds
			if err := b.compare(t); err != nil {
				return err
			}
		}
	}
	for _, s := range []*side{b.theirs, b.ours} {
		if err := s.snapshotter.Remove(b.ctx, container); err != nil {
			return err
		}
	}
	return nil
}

// usageOfTree measures Usage of a container that has written many files.
func (b *bench) usageOfTree() error {
	const container = "tree"
	for _, s := range []*side{b.theirs, b.ours} {
		mounts, err := s.snapshotter.Prepare(b.ctx, container, chainName(usualChain))
		if err != nil {
			return err
		}
		if err := fill(mounts, b.size.treeFiles, 1); err != nil {
			return err
		}
	}
	for _, count := range []int{1, callers} {
		t := task{
			name:    fmt.Sprintf("Usage, files: %d", b.size.treeFiles),
			callers: count, calls: 2 * callers, rounds: b.size.rounds,
			call: func(s *side, _ int) error {
				usage, err := s.snapshotter.Usage(b.ctx, container)
				if err == nil && usage.Inodes < int64(b.size.treeFiles) {
					err = fmt.Errorf("only %d inodes counted", usage.Inodes)
				}
				return err
			},
		}
		if count == 1 {
			t.goal = goal{ratioAtMost: 0.7}
		}
		if err := b.compare(t); err != nil {
			return err
		}
	}
	for _, s := range []*side{b.theirs, b.ours} {
		if err := s.snapshotter.Remove(b.ctx, container); err != nil {
			return err
		}
		if err := b.clean(s); err != nil {
			return err
		}
	}
	return nil
}

// cleanup measures the deletion of removed snapshots.
func (b *bench) cleanup() error {
	const files = 100
	return b.compare(task{
		name:    fmt.Sprintf("Cleanup, %d of %d files", b.size.cleanupSnapshots, files),
		callers: 1, calls: 1, rounds: b.size.cleanupRounds,
		goal: goal{ratioAtMost: 0.5},
		before: func(s *side, _ int) error {
			for number := 0; number < b.size.cleanupSnapshots; number++ {
				mounts, err := s.snapshotter.Prepare(b.ctx, key(number), chainName(usualChain))
				if err != nil {
					return err
				}
				if err := fill(mounts, files, 1); err != nil {
					return err
				}
				if err := s.snapshotter.Remove(b.ctx, key(number)); err != nil {
					return err
				}
			}
			return b.settle()
		},
		call: func(s *side, _ int) error { return b.clean(s) },
	})
}

// commits measures Commit of unpacked layers: with the daemon's default, which
// makes a layer durable first, and without that, as the built-in one does it.
func (b *bench) commits(places places) error {
	for _, count := range []int{1, callers} {
		for _, files := range b.size.layerFiles {
			if err := b.commit(files, count, "", goal{}); err != nil {
				return err
			}
		}
	}
	unsynced, err := startDaemon(places, "unsynced", "--sync", "none")
	if err != nil {
		return err
	}
	defer unsynced.kill()
	usual := b.ours
	defer func() { b.ours = usual }()
	b.ours = &side{snapshotter: unsynced.client, cpu: unsynced.cpu}
	if err := b.chain(b.ours, shortChain); err != nil {
		return err
	}
	for _, count := range []int{1, callers} {
		for _, files := range b.size.layerFiles {
			limit := goal{}
			if count == 1 && files == 100 {
				limit = goal{ratioAtMost: 1}
			}
			if err := b.commit(files, count, ", --sync none", limit); err != nil {
				return err
			}
		}
	}
	return unsynced.stop()
}

func (b *bench) commit(files, count int, how string, limit goal) error {
	t := b.writing(fmt.Sprintf("Commit, files: %d%s", files, how), count)
	t.goal = limit
	if files > 100 {
		t.calls = min(t.calls, callers)
	} else if files > 1 {
		t.calls = min(t.calls, 5*callers)
	}
	t.before = func(s *side, call int) error {
		mounts, err := s.snapshotter.Prepare(b.ctx, unpackKey(call), chainName(shortChain),
			snapshots.WithLabels(map[string]string{labelRef: layerName(call)}))
		if err != nil {
			return err
		}
		return fill(mounts, files, 4096)
	}
	t.call = func(s *side, call int) error {
		return s.snapshotter.Commit(b.ctx, layerName(call), unpackKey(call))
	}
	t.after = func(s *side) error {
		for call := 0; call < t.calls; call++ {
			if err := s.snapshotter.Remove(b.ctx, layerName(call)); err != nil {
				return err
			}
		}
		return b.clean(s)
	}
	return b.compare(t)
}

// populated measures both sides with that many snapshots.
func (b *bench) populated(count int) error {
	if err := b.populate(count); err != nil {
		return err
	}
	t := task{
		name: fmt.Sprintf("List of %d", count), callers: 1, rounds: b.size.rounds,
		calls: max(1, 10_000/count),
		call: func(s *side, _ int) error {
			listed := 0
			err := s.snapshotter.Walk(b.ctx, func(context.Context, snapshots.Info) error {
				listed++
				return nil
			})
			if err == nil && listed < count {
				err = fmt.Errorf("only %d listed", listed)
			}
			return err
		},
	}
	if count == 10_000 {
		t.goal = goal{ratioAtMost: 2}
	}
	if err := b.compare(t); err != nil {
		return err
	}
	if count != 1000 {
		return nil
	}
	return b.criRound(count, goal{cpuAtMost: 50})
}

// criRound measures the requests that containerd's CRI plugin makes every ten
// seconds.
func (b *bench) criRound(count int, limit goal) error {
	return b.compare(task{
		name: fmt.Sprintf("CRI's round over %d", count), callers: 1, calls: 1, rounds: b.size.rounds,
		goal: limit,
		call: func(s *side, _ int) error {
			var all []snapshots.Info
			err := s.snapshotter.Walk(b.ctx, func(_ context.Context, info snapshots.Info) error {
				all = append(all, info)
				return nil
			})
			if err != nil {
				return err
			}
			for _, info := range all {
				if _, err := s.snapshotter.Stat(b.ctx, info.Name); err != nil {
					return err
				}
				if info.Kind == snapshots.KindActive {
					if _, err := s.snapshotter.Usage(b.ctx, info.Name); err != nil {
						return err
					}
				}
			}
			return nil
		},
	})
}

// grown measures the same with many snapshots, once, to show how the cost
// grows.
func (b *bench) grown() error {
	usual := b.size
	defer func() { b.size = usual }()
	b.size.rounds = 2
	if err := b.populate(usual.grown); err != nil {
		return err
	}
	where := fmt.Sprintf(", among %d", usual.grown)
	if err := b.prepares(usualChain, where); err != nil {
		return err
	}
	if err := b.views(where); err != nil {
		return err
	}
	if err := b.removes(where); err != nil {
		return err
	}
	if err := b.reads(where); err != nil {
		return err
	}
	if err := b.commit(100, 1, where, goal{}); err != nil {
		return err
	}
	if err := b.populated(usual.grown); err != nil {
		return err
	}
	return b.criRound(usual.grown, goal{})
}

// memory reports what a daemon takes after few and after many requests.
func (b *bench) memory(places places) error {
	b.report.progress("memory")
	daemon, err := startDaemon(places, "empty")
	if err != nil {
		return err
	}
	defer daemon.kill()
	b.report.resident("resident, idle", daemon, goal{})
	s := &side{snapshotter: daemon.client, cpu: daemon.cpu}
	if err := b.chain(s, usualChain); err != nil {
		return err
	}
	// Six requests in a turn, of the kinds in a container's life.
	life := task{callers: callers, call: func(s *side, call int) error {
		name := key(call)
		if _, err := s.snapshotter.Prepare(b.ctx, name, chainName(usualChain)); err != nil {
			return err
		}
		if _, err := s.snapshotter.Stat(b.ctx, name); err != nil {
			return err
		}
		if _, err := s.snapshotter.Mounts(b.ctx, name); err != nil {
			return err
		}
		if _, err := s.snapshotter.Usage(b.ctx, name); err != nil {
			return err
		}
		walk := func(context.Context, snapshots.Info) error { return nil }
		if err := s.snapshotter.Walk(b.ctx, walk); err != nil {
			return err
		}
		return s.snapshotter.Remove(b.ctx, name)
	}}
	live := func(requests int) error {
		life.calls = requests / 6
		_, err := b.measure(life, s)
		if err != nil {
			return err
		}
		return b.clean(s)
	}
	if err := live(b.size.memoryFew); err != nil {
		return err
	}
	few := fmt.Sprintf("resident after %d requests", b.size.memoryFew)
	b.report.resident(few, daemon, goal{})
	if err := live(b.size.memoryMany - b.size.memoryFew); err != nil {
		return err
	}
	b.report.resident(fmt.Sprintf("resident after %d requests", b.size.memoryMany), daemon,
		goal{atMost: 10})
	// A root without snapshots, for the starts.
	for layer := usualChain; layer > 0; layer-- {
		if err := s.snapshotter.Remove(b.ctx, chainLayer(usualChain, layer)); err != nil {
			return err
		}
	}
	if err := b.clean(s); err != nil {
		return err
	}
	return daemon.stop()
}

// starts measures the time from exec to ready.
func (b *bench) starts(places places, name, root string, limit goal) error {
	b.report.progress(name)
	var values []float64
	for number := 0; number < b.size.rounds; number++ {
		if err := b.settle(); err != nil {
			return err
		}
		daemon, err := startDaemon(places, root)
		if err != nil {
			return err
		}
		values = append(values, milliseconds(daemon.readyAfter))
		if err := daemon.stop(); err != nil {
			return err
		}
	}
	b.report.own(name, "ms", values, limit)
	return nil
}

// writing is a task whose calls wait for a disk.
func (b *bench) writing(name string, count int) task {
	return task{name: name, callers: count, calls: b.size.writes, rounds: b.size.rounds}
}

func key(number int) string {
	return fmt.Sprintf("k8s.io/%d/container-%d", number, number)
}

func unpackKey(number int) string {
	return fmt.Sprintf("k8s.io/%d/extract-%d-abcd %s", number, number, digest("unpacked", number))
}

func layerName(number int) string {
	return fmt.Sprintf("k8s.io/%d/%s", number, digest("unpacked", number))
}

// digest has the shape of the names that containerd gives to layers.
func digest(what string, number int) string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(fmt.Sprint(what, " ", number))))
}

func chainName(length int) string {
	return chainLayer(length, length)
}

func chainLayer(length, layer int) string {
	return fmt.Sprintf("k8s.io/%d/%s", layer, digest(fmt.Sprintf("chain of %d", length), layer))
}

// layer makes one empty layer.
func (b *bench) layer(s *side, name, parent string) error {
	unpack := fmt.Sprintf("k8s.io/0/extract-%d %s", s.next(), name)
	labels := snapshots.WithLabels(map[string]string{labelRef: name})
	if _, err := s.snapshotter.Prepare(b.ctx, unpack, parent, labels); err != nil {
		return err
	}
	return s.snapshotter.Commit(b.ctx, name, unpack, labels)
}

func (b *bench) chain(s *side, length int) error {
	parent := ""
	for layer := 1; layer <= length; layer++ {
		name := chainLayer(length, layer)
		if err := b.layer(s, name, parent); err != nil {
			return err
		}
		parent = name
	}
	return nil
}

// populate adds images of four layers with one container each, until there are
// that many snapshots.
func (b *bench) populate(count int) error {
	const group = 5
	for _, s := range []*side{b.theirs, b.ours} {
		there := 0
		if err := s.snapshotter.Walk(b.ctx, func(context.Context, snapshots.Info) error {
			there++
			return nil
		}); err != nil {
			return err
		}
		t := task{callers: callers, calls: max(0, count-there+group-1) / group,
			call: func(s *side, _ int) error {
				image := int(s.next())
				parent := ""
				for layer := 1; layer < group; layer++ {
					name := fmt.Sprintf("k8s.io/%d/%s", layer, digest(fmt.Sprint("image ", layer), image))
					if err := b.layer(s, name, parent); err != nil {
						return err
					}
					parent = name
				}
				_, err := s.snapshotter.Prepare(b.ctx, fmt.Sprintf("k8s.io/5/pod-%d", image), parent)
				return err
			}}
		if t.calls == 0 {
			continue
		}
		b.report.progress(fmt.Sprintf("%d snapshots", count))
		if _, err := b.measure(t, s); err != nil {
			return fmt.Errorf("make %d snapshots: %w", count, err)
		}
	}
	return nil
}

// removeAll removes the containers of a round and their files.
func (b *bench) removeAll(calls int) func(*side) error {
	return func(s *side) error {
		for call := 0; call < calls; call++ {
			if err := s.snapshotter.Remove(b.ctx, key(call)); err != nil {
				return err
			}
		}
		return b.clean(s)
	}
}

func (b *bench) clean(s *side) error {
	cleaner, ok := s.snapshotter.(snapshots.Cleaner)
	if !ok {
		return errdefs.ErrNotImplemented
	}
	return cleaner.Cleanup(b.ctx)
}

// fill puts files into a snapshot, a hundred to a directory, as a container or an
// unpack would: into its own upper directory.
func fill(mounts []mount.Mount, files, bytes int) error {
	upper := mounts[0].Source
	for _, option := range mounts[0].Options {
		if strings.HasPrefix(option, "upperdir=") {
			upper = strings.TrimPrefix(option, "upperdir=")
		}
	}
	content := make([]byte, bytes)
	for file := 0; file < files; file++ {
		directory := filepath.Join(upper, fmt.Sprintf("directory-%d", file/100))
		if file%100 == 0 {
			if err := os.Mkdir(directory, 0o755); err != nil {
				return err
			}
		}
		name := filepath.Join(directory, fmt.Sprintf("file-%d", file))
		if err := os.WriteFile(name, content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Go has these functions only since 1.21.
func min(a, b int) int {
	if a < b {
		return a
	}
	return b
}

func max(a, b int) int {
	if a > b {
		return a
	}
	return b
}
