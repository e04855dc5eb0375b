package main

import (
	"fmt"
	"path/filepath"
	"sort"
	"time"

	"github.com/containerd/containerd/snapshots/overlay"
)

// cycles of Prepare, View and Remove: a hundred requests, about.
const cycles = 33

// kinds are the requests of a cycle, in their order, with the goals on a disk that
// flushes in 5 ms and on one that flushes at once.
var kinds = []struct {
	name       string
	slow, fast float64
}{{"Prepare", 0.6, 1}, {"View", 0.6, 0.8}, {"Remove", 0.6, 1.1}}

// disk is a pair of volumes, and how long a flush takes there.
type disk struct {
	name   string
	places places
}

// slow measures the requests of a container's life, directly after a start and later,
// on each of the disks.
func (b *bench) slow(disks []disk) error {
	for _, disk := range disks {
		b.disks = []string{disk.places.image, disk.places.writable}
		if err := b.slowOn(disk); err != nil {
			return fmt.Errorf("%s: %w", disk.name, err)
		}
	}
	return nil
}

// life is what one side does in a round: rows of the table by their name.
type life map[string]round

func (b *bench) slowOn(disk disk) error {
	builtIn := func() (*side, func() error, error) {
		s, err := overlay.NewSnapshotter(filepath.Join(disk.places.image, "built-in"),
			overlay.AsynchronousRemove)
		if err != nil {
			return nil, nil, err
		}
		return &side{snapshotter: s, cpu: ownCPU}, s.Close, nil
	}
	daemon := func() (*side, func() error, error) {
		d, err := startDaemon(disk.places, "daemon")
		if err != nil {
			return nil, nil, err
		}
		return &side{snapshotter: d.client, cpu: d.cpu}, d.stop, nil
	}
	starts := [2]func() (*side, func() error, error){builtIn, daemon}
	for _, start := range starts {
		s, stop, err := start()
		if err != nil {
			return err
		}
		if err := b.chain(s, usualChain); err != nil {
			return err
		}
		if err := stop(); err != nil {
			return err
		}
	}
	var lives [2][]life
	for number := 0; number < b.size.rounds; number++ {
		b.report.progress(fmt.Sprintf("%s, round %d", disk.name, number+1))
		for turn := range starts {
			who := (turn + number) % len(starts)
			s, stop, err := starts[who]()
			if err != nil {
				return err
			}
			made, err := b.live(s)
			if err != nil {
				return err
			}
			lives[who] = append(lives[who], made)
			if err := stop(); err != nil {
				return err
			}
		}
	}
	b.enterLives(disk.name, lives)
	return nil
}

// live is one life of a side: the first hundred requests, the next, and those of many
// callers.
func (b *bench) live(s *side) (life, error) {
	made := life{}
	for _, when := range []string{"first 100", "later"} {
		var lasted [3][]time.Duration
		for number := 0; number < cycles; number++ {
			for kind, call := range b.cycle(s, fmt.Sprintf("%s-%d", when, number)) {
				begun := time.Now()
				if err := call(); err != nil {
					return nil, err
				}
				lasted[kind] = append(lasted[kind], time.Since(begun))
			}
		}
		for kind, times := range lasted {
			sort.Slice(times, func(i, j int) bool { return times[i] < times[j] })
			made[kinds[kind].name+", "+when] = round{
				p50: milliseconds(times[len(times)/2]), p99: milliseconds(times[len(times)-1]),
				perSecond: 1000 / milliseconds(times[len(times)/2]),
			}
		}
	}
	many := task{callers: callers, calls: 2 * cycles, call: func(s *side, number int) error {
		for _, call := range b.cycle(s, fmt.Sprintf("many-%d", number)) {
			if err := call(); err != nil {
				return err
			}
		}
		return nil
	}}
	measured, err := b.measure(many, s)
	if err != nil {
		return nil, err
	}
	measured.perSecond *= float64(len(kinds))
	made["all three"] = measured
	// The views of this life.
	left := task{callers: callers, calls: 4 * cycles, call: func(s *side, number int) error {
		key := fmt.Sprintf("view many-%d", number)
		if number >= 2*cycles {
			when := []string{"first 100", "later"}[number%2]
			key = fmt.Sprintf("view %s-%d", when, (number-2*cycles)/2)
		}
		return s.snapshotter.Remove(b.ctx, key)
	}}
	if _, err := b.measure(left, s); err != nil {
		return nil, err
	}
	return made, b.clean(s)
}

// cycle is a Prepare, a View, and the Remove of what was prepared.
func (b *bench) cycle(s *side, name string) [3]func() error {
	parent, key := chainName(usualChain), "container "+name
	return [3]func() error{
		func() error { _, err := s.snapshotter.Prepare(b.ctx, key, parent); return err },
		func() error { _, err := s.snapshotter.View(b.ctx, "view "+name, parent); return err },
		func() error { return s.snapshotter.Remove(b.ctx, key) },
	}
}

func (b *bench) enterLives(disk string, lives [2][]life) {
	enter := func(row string, count int, goal goal) {
		var rounds [2][]round
		for who := range lives {
			for _, made := range lives[who] {
				rounds[who] = append(rounds[who], made[row])
			}
		}
		// Without processor time and flushes, which cover more than the calls.
		t := task{name: disk + ": " + row, callers: count, calls: cycles, rounds: b.size.rounds,
			before: func(*side, int) error { return nil }, goal: goal}
		b.report.compared(t, rounds[0], rounds[1])
	}
	for _, when := range []string{"first 100", "later"} {
		for _, kind := range kinds {
			limit := goal{}
			switch disk {
			case "5 ms":
				limit.ratioAtMost = kind.slow
			case "plain":
				limit.ratioAtMost = kind.fast
			}
			enter(kind.name+", "+when, 1, limit)
		}
	}
	limit := goal{}
	switch disk {
	case "5 ms":
		limit.speedAtLeast = 5
	case "plain":
		limit.speedAtLeast = 2.5
	}
	enter("all three", callers, limit)
}
