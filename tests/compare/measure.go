package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/snapshots"
	"golang.org/x/sys/unix"
)

// side is one of the two that are compared.
type side struct {
	snapshotter snapshots.Snapshotter
	// The processor time it has used so far. For the built-in one, this includes
	// the time of the measurement itself.
	cpu func() time.Duration
	// Numbers for snapshots, so that no name is used twice.
	number int64
}

func (s *side) next() int64 {
	return atomic.AddInt64(&s.number, 1)
}

// task is what is measured.
type task struct {
	name    string
	callers int
	calls   int
	rounds  int
	// Called before each call, and not timed: with one caller directly before it,
	// with several before the first call of all. May be nil.
	before func(s *side, call int) error
	call   func(s *side, call int) error
	// Called after all calls of a round, and not timed. May be nil.
	after func(s *side) error
	goal  goal
}

// round is what one side needed for all calls of a task.
type round struct {
	p50, p99, perSecond float64
	cpu                 float64
	flushes             int64
}

// bench holds what all measurements share.
type bench struct {
	ctx          context.Context
	size         scale
	report       *report
	disks        []string
	theirs, ours *side
}

// compare measures a task on both sides in turn, A B B A.
func (b *bench) compare(t task) error {
	b.report.progress(t.name)
	both := [2]*side{b.theirs, b.ours}
	var rounds [2][]round
	for number := 0; number < t.rounds; number++ {
		for turn := range both {
			who := (turn + number) % len(both)
			measured, err := b.measure(t, both[who])
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			rounds[who] = append(rounds[who], measured)
		}
	}
	b.report.compared(t, rounds[0], rounds[1])
	return nil
}

// alone measures a task that only the daemon can do.
func (b *bench) alone(t task) error {
	b.report.progress(t.name)
	var rounds []round
	for number := 0; number < t.rounds; number++ {
		measured, err := b.measure(t, b.ours)
		if err != nil {
			return fmt.Errorf("%s: %w", t.name, err)
		}
		rounds = append(rounds, measured)
	}
	b.report.compared(t, nil, rounds)
	return nil
}

func (b *bench) measure(t task, s *side) (round, error) {
	before := func(call int) error {
		if t.before == nil {
			return nil
		}
		return t.before(s, call)
	}
	if t.callers > 1 {
		for call := 0; call < t.calls; call++ {
			if err := before(call); err != nil {
				return round{}, err
			}
		}
	}
	// Neither side pays for writes or garbage that the other has left.
	if err := b.settle(); err != nil {
		return round{}, err
	}
	lasted := make([]time.Duration, t.calls)
	flushesBefore, err := b.flushes()
	if err != nil {
		return round{}, err
	}
	cpuBefore := s.cpu()
	var elapsed time.Duration
	if t.callers == 1 {
		for call := range lasted {
			if err := before(call); err != nil {
				return round{}, err
			}
			begun := time.Now()
			err := t.call(s, call)
			lasted[call] = time.Since(begun)
			if err != nil {
				return round{}, err
			}
			elapsed += lasted[call]
		}
	} else {
		elapsed, err = together(t, s, lasted)
		if err != nil {
			return round{}, err
		}
	}
	cpu := s.cpu() - cpuBefore
	flushes, err := b.flushes()
	if err != nil {
		return round{}, err
	}
	if t.after != nil {
		if err := t.after(s); err != nil {
			return round{}, err
		}
	}
	sort.Slice(lasted, func(i, j int) bool { return lasted[i] < lasted[j] })
	return round{
		p50:       milliseconds(lasted[len(lasted)/2]),
		p99:       milliseconds(lasted[(len(lasted)*99)/100]),
		perSecond: float64(t.calls) / elapsed.Seconds(),
		cpu:       milliseconds(cpu),
		flushes:   flushes - flushesBefore,
	}, nil
}

// flushes returns how often the disks were flushed: the 16th figure of the block
// layer (Linux Documentation/block/stat.rst) for the loop devices that
// tests/bench.sh makes.
func (b *bench) flushes() (int64, error) {
	var sum int64
	for _, disk := range b.disks {
		var stat unix.Stat_t
		if err := unix.Stat(disk, &stat); err != nil {
			return 0, err
		}
		path := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(stat.Dev), unix.Minor(stat.Dev))
		text, err := os.ReadFile(path)
		if err != nil {
			return 0, err
		}
		figures := strings.Fields(string(text))
		if len(figures) < 16 {
			return 0, fmt.Errorf("%s has no count of flushes, as it has since Linux 5.5", path)
		}
		count, err := strconv.ParseInt(figures[15], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
		sum += count
	}
	return sum, nil
}

// together shares the calls of a task between several callers on one
// connection, because containerd has only one.
func together(t task, s *side, lasted []time.Duration) (time.Duration, error) {
	var waiting sync.WaitGroup
	var next int64
	failures := make(chan error, t.callers)
	begun := time.Now()
	for caller := 0; caller < t.callers; caller++ {
		waiting.Add(1)
		go func() {
			defer waiting.Done()
			for {
				call := int(atomic.AddInt64(&next, 1)) - 1
				if call >= t.calls {
					return
				}
				begun := time.Now()
				err := t.call(s, call)
				lasted[call] = time.Since(begun)
				if err != nil {
					failures <- err
					return
				}
			}
		}()
	}
	waiting.Wait()
	elapsed := time.Since(begun)
	select {
	case err := <-failures:
		return 0, err
	default:
		return elapsed, nil
	}
}

// settle writes all dirty data to the disks, and collects garbage.
func (b *bench) settle() error {
	runtime.GC()
	for _, disk := range b.disks {
		directory, err := os.Open(disk)
		if err != nil {
			return err
		}
		err = unix.Syncfs(int(directory.Fd()))
		directory.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func milliseconds(d time.Duration) float64 {
	return float64(d) / float64(time.Millisecond)
}

// figure is a median, and the values it is the median of.
type figure struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

func figureOf(values []float64) figure {
	sorted := append([]float64(nil), values...)
	sort.Float64s(sorted)
	middle := sorted[len(sorted)/2]
	if len(sorted)%2 == 0 {
		middle = (middle + sorted[len(sorted)/2-1]) / 2
	}
	return figure{middle, sorted[0], sorted[len(sorted)-1]}
}
