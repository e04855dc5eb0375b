// Compares the daemon with the snapshotter that is built into containerd, in
// one process: the built-in one is called directly, and the daemon through
// containerd's proxy client, as containerd would call them. tests/bench.sh runs
// it.
//
// Both work on the same disks. Each measurement is made in rounds, in which the
// two take turns. The one that begins alternates, so that other load on the
// machine affects both. A figure is the median of its rounds, with the smallest
// and the largest beside it.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/snapshots/overlay"
)

// scale is how much is measured.
type scale struct {
	rounds int
	// calls of a request that waits for a disk, and of one that only reads.
	writes, reads int
	// files in the large tree that Usage counts, and in layers that are committed.
	treeFiles  int
	layerFiles []int
	// removed snapshots that each Cleanup deletes, and rounds of it.
	cleanupSnapshots, cleanupRounds int
	// numbers of snapshots at which List is measured, ascending.
	lists []int
	// the one of these numbers at which starts are measured.
	startAt int
	// requests between the two looks at the memory.
	memoryFew, memoryMany int
	// number of snapshots for the last part; 0 leaves it out.
	grown int
}

var (
	full = scale{
		rounds: 10, writes: 200, reads: 2000,
		treeFiles: 10_000, layerFiles: []int{1, 100, 5000},
		cleanupSnapshots: 1000, cleanupRounds: 4,
		lists: []int{100, 1000, 10_000}, startAt: 10_000,
		memoryFew: 1000, memoryMany: 100_000, grown: 100_000,
	}
	quick = scale{
		rounds: 2, writes: 20, reads: 100,
		treeFiles: 1000, layerFiles: []int{1, 100, 500},
		cleanupSnapshots: 50, cleanupRounds: 2,
		lists: []int{100, 1000}, startAt: 1000,
		memoryFew: 500, memoryMany: 2500, grown: 2000,
	}
)

func main() {
	image := flag.String("image", "", "directory on the disk of layers and databases")
	writable := flag.String("writable", "", "directory on the disk of what containers write")
	binary := flag.String("daemon", "", "the program to measure")
	jsonPath := flag.String("json", "", "write the figures there as well")
	isQuick := flag.Bool("quick", false, "little of everything: to see that it works")
	isSlow := flag.Bool("slow", false, "requests alone, on each disk NAME IMAGE WRITABLE that follows")
	flag.Parse()

	size := full
	if *isQuick {
		size = quick
	}
	places := places{image: *image, writable: *writable, binary: *binary}
	report := newReport(*isQuick)
	work := func() error { return run(context.Background(), places, size, report) }
	if *isSlow {
		work = func() error { return runSlow(context.Background(), *binary, flag.Args(), report) }
	}
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, "compare:", err)
		os.Exit(1)
	}
	report.finish()
	report.print(os.Stdout)
	if *jsonPath != "" {
		if err := report.write(*jsonPath); err != nil {
			fmt.Fprintln(os.Stderr, "compare:", err)
			os.Exit(1)
		}
	}
}

func runSlow(ctx context.Context, binary string, names []string, report *report) error {
	var disks []disk
	for ; len(names) >= 3; names = names[3:] {
		disks = append(disks, disk{names[0],
			places{image: names[1], writable: names[2], binary: binary}})
	}
	bench := &bench{ctx: ctx, size: scale{rounds: 4}, report: report}
	return bench.slow(disks)
}

func run(ctx context.Context, places places, size scale, report *report) error {
	// As in containerd's own configuration: removal is asynchronous, which is also
	// the daemon's default.
	builtIn, err := overlay.NewSnapshotter(filepath.Join(places.image, "built-in"),
		overlay.AsynchronousRemove)
	if err != nil {
		return err
	}
	defer builtIn.Close()
	daemon, err := startDaemon(places, "daemon")
	if err != nil {
		return err
	}
	defer func() { daemon.kill() }()
	bench := &bench{
		ctx:    ctx,
		size:   size,
		report: report,
		disks:  []string{places.image, places.writable},
		theirs: &side{snapshotter: builtIn, cpu: ownCPU},
		ours:   &side{snapshotter: daemon.client, cpu: daemon.cpu},
	}

	if err := bench.requests(daemon); err != nil {
		return err
	}
	if err := bench.commits(places); err != nil {
		return err
	}
	if err := bench.memory(places); err != nil {
		return err
	}
	if err := bench.starts(places, "start, no snapshots", "empty", goal{atMost: 30}); err != nil {
		return err
	}
	for _, count := range size.lists {
		if err := bench.populated(count); err != nil {
			return err
		}
	}
	report.resident("resident after all that", daemon, goal{atMost: 10})
	report.cpuSeconds("CPU seconds until then", daemon)

	// The daemon that is restarted uses its root.
	if err := daemon.stop(); err != nil {
		return err
	}
	name := fmt.Sprintf("start, %d snapshots", size.startAt)
	if err := bench.starts(places, name, "daemon", goal{atMost: 200}); err != nil {
		return err
	}
	if size.grown == 0 {
		return nil
	}
	if daemon, err = startDaemon(places, "daemon"); err != nil {
		return err
	}
	bench.ours = &side{snapshotter: daemon.client, cpu: daemon.cpu, number: bench.ours.number}
	if err := bench.grown(); err != nil {
		return err
	}
	report.resident(fmt.Sprintf("resident, %d snapshots", size.grown), daemon, goal{})
	if err := daemon.stop(); err != nil {
		return err
	}
	name = fmt.Sprintf("start, %d snapshots", size.grown)
	return bench.starts(places, name, "daemon", goal{})
}
