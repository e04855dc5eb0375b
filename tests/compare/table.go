package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// goal is what a row should reach; 0 means no goal.
type goal struct {
	// For the ratio of the daemon's median to the built-in one's.
	ratioAtMost float64
	// For the ratio of the daemon's requests per second to the built-in one's.
	speedAtLeast float64
	// For the daemon's own figure: milliseconds, MiB.
	atMost float64
	// For the daemon's processor time per call, in milliseconds.
	cpuAtMost float64
}

// outcome is a goal and whether it was reached.
type outcome struct {
	Goal string `json:"goal,omitempty"`
	Met  *bool  `json:"met,omitempty"`
}

func (o outcome) String() string {
	if o.Met == nil {
		return ""
	}
	if *o.Met {
		return "met     " + o.Goal
	}
	return "MISSED  " + o.Goal
}

func judged(text string, limit float64, isMet bool) outcome {
	return outcome{Goal: fmt.Sprintf(text, limit), Met: &isMet}
}

// timing is how long the calls of one side took, in milliseconds.
type timing struct {
	P50       figure `json:"p50_ms"`
	P99       figure `json:"p99_ms"`
	PerSecond figure `json:"per_second"`
	// Processor time of one call; 0 if other work used it, too.
	CPU figure `json:"cpu_ms"`
	// How often a disk was flushed per call; 0 if unknown.
	Flushes figure `json:"flushes"`
}

// row is a task, measured on both sides or on the daemon alone.
type row struct {
	Name    string  `json:"name"`
	Callers int     `json:"callers"`
	Calls   int     `json:"calls"`
	Rounds  int     `json:"rounds"`
	Theirs  *timing `json:"built_in,omitempty"`
	Ours    timing  `json:"daemon"`
	// The ratios of both medians, and of both speeds, round by round.
	Ratio *figure `json:"ratio_of_p50,omitempty"`
	Speed *figure `json:"ratio_of_per_second,omitempty"`
	outcome
}

// single is a figure that only the daemon has.
type single struct {
	Name string `json:"name"`
	Unit string `json:"unit"`
	figure
	// A remark beside the figure.
	Note string `json:"note,omitempty"`
	outcome
}

// report is everything that was measured.
type report struct {
	Machine string    `json:"machine"`
	Began   time.Time `json:"began"`
	Seconds float64   `json:"seconds"`
	Quick   bool      `json:"quick"`
	// The load of the machine (proc_loadavg(5)) at both ends.
	Load    [2]string `json:"load"`
	Rows    []row     `json:"rows"`
	Singles []single  `json:"singles"`
}

func newReport(isQuick bool) *report {
	var name unix.Utsname
	kernel := "?"
	if unix.Uname(&name) == nil {
		kernel = unix.ByteSliceToString(name.Release[:])
	}
	return &report{
		Machine: fmt.Sprintf("Linux %s %s, %d processors", kernel, runtime.GOARCH, runtime.NumCPU()),
		Began:   time.Now(),
		Quick:   isQuick,
		Load:    [2]string{load(), ""},
	}
}

func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "?"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

func (r *report) finish() {
	r.Seconds = time.Since(r.Began).Seconds()
	r.Load[1] = load()
}

// progress shows what is being measured.
func (r *report) progress(what string) {
	fmt.Fprintf(os.Stderr, "%6.0f s  %s\n", time.Since(r.Began).Seconds(), what)
}

// compared enters a task; if theirs is empty, only the daemon's figures.
func (r *report) compared(t task, theirs, ours []round) {
	made := row{Name: t.name, Callers: t.callers, Calls: t.calls, Rounds: t.rounds}
	// Several callers begin after all is prepared; a single one prepares between
	// its calls.
	isAlone := t.before == nil || t.callers > 1
	made.Ours = timingOf(ours, t.calls, isAlone)
	if theirs != nil {
		timed := timingOf(theirs, t.calls, isAlone)
		made.Theirs = &timed
		var ratios, speeds []float64
		for number := range ours {
			ratios = append(ratios, ours[number].p50/theirs[number].p50)
			speeds = append(speeds, ours[number].perSecond/theirs[number].perSecond)
		}
		ratio, speed := figureOf(ratios), figureOf(speeds)
		made.Ratio, made.Speed = &ratio, &speed
	}
	switch {
	case t.goal.ratioAtMost > 0:
		limit := t.goal.ratioAtMost
		made.outcome = judged("p50 <= %g x", limit, made.Ratio.Median <= limit)
	case t.goal.speedAtLeast > 0:
		limit := t.goal.speedAtLeast
		made.outcome = judged("calls/s >= %g x", limit, made.Speed.Median >= limit)
	case t.goal.atMost > 0:
		limit := t.goal.atMost
		made.outcome = judged("p50 <= %g ms", limit, made.Ours.P50.Median <= limit)
	case t.goal.cpuAtMost > 0:
		limit := t.goal.cpuAtMost
		made.outcome = judged("CPU <= %g ms", limit, made.Ours.CPU.Median <= limit)
	}
	r.Rows = append(r.Rows, made)
}

func timingOf(rounds []round, calls int, isAlone bool) timing {
	of := func(value func(round) float64) figure {
		var values []float64
		for _, round := range rounds {
			values = append(values, value(round))
		}
		return figureOf(values)
	}
	timed := timing{
		P50:       of(func(r round) float64 { return r.p50 }),
		P99:       of(func(r round) float64 { return r.p99 }),
		PerSecond: of(func(r round) float64 { return r.perSecond }),
	}
	if isAlone {
		timed.CPU = of(func(r round) float64 { return r.cpu / float64(calls) })
		timed.Flushes = of(func(r round) float64 { return float64(r.flushes) / float64(calls) })
	}
	return timed
}

// own enters a figure that only the daemon has.
func (r *report) own(name, unit string, values []float64, limit goal) {
	r.enter(single{Name: name, Unit: unit, figure: figureOf(values)}, limit)
}

func (r *report) enter(made single, limit goal) {
	if limit.atMost > 0 {
		made.outcome = judged("<= %g "+made.Unit, limit.atMost, made.Median <= limit.atMost)
	}
	r.Singles = append(r.Singles, made)
}

// resident enters the memory that a daemon takes.
func (r *report) resident(name string, daemon *daemon, limit goal) {
	var values [3]float64
	for number, field := range []string{"VmRSS", "RssAnon", "VmHWM"} {
		value, err := daemon.memory(field)
		if err != nil {
			fmt.Fprintln(os.Stderr, "compare:", err)
			return
		}
		values[number] = value
	}
	r.enter(single{Name: name, Unit: "MiB", figure: figureOf(values[:1]),
		Note: fmt.Sprintf("%.1f of it anonymous, at most %.1f so far", values[1], values[2])}, limit)
}

func (r *report) cpuSeconds(name string, daemon *daemon) {
	r.own(name, "s", []float64{daemon.cpu().Seconds()}, goal{})
}

func (r *report) write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

// print prints one table.
func (r *report) print(to io.Writer) {
	fmt.Fprintf(to, "%s, load %s at the beginning and %s after %.0f s\n", r.Machine,
		r.Load[0], r.Load[1], r.Seconds)
	fmt.Fprintln(to, "Milliseconds, medians of the rounds; in brackets the smallest and the largest ratio.")
	if r.Quick {
		fmt.Fprintln(to, "A quick run: too few calls for figures.")
	}
	fmt.Fprintln(to)
	table := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, left("")+"\tcallers\tbuilt-in p50\tp99\tcalls/s\tflushes\tdaemon p50\tp99\tcalls/s\tflushes\tCPU\tratio of p50\tof calls/s\t  goal")
	for _, made := range r.Rows {
		theirs := "\t\t\t"
		if made.Theirs != nil {
			theirs = columns(*made.Theirs)
		}
		ratio, speed := "", ""
		if made.Ratio != nil {
			ratio, speed = spread(*made.Ratio), spread(*made.Speed)
		}
		cpu := ""
		if made.Ours.CPU.Median > 0 {
			cpu = brief(made.Ours.CPU.Median)
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t  %s\n",
			left(made.Name), made.Callers, theirs, columns(made.Ours), cpu, ratio, speed, made.outcome)
	}
	table.Flush()
	fmt.Fprintln(to)
	table = tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	for _, made := range r.Singles {
		value := brief(made.Median)
		if made.Min < made.Max {
			value += fmt.Sprintf(" (%s-%s)", brief(made.Min), brief(made.Max))
		}
		fmt.Fprintf(table, "%s\t%s %s\t%s\t%s\n", made.Name, value, made.Unit, made.Note, made.outcome)
	}
	table.Flush()
}

// left fills up a name in a table whose cells are right-aligned.
func left(name string) string {
	return fmt.Sprintf("%-38s", name)
}

func columns(t timing) string {
	flushes := ""
	if t.Flushes.Median > 0 {
		flushes = fmt.Sprintf("%.2f", t.Flushes.Median)
	}
	return fmt.Sprintf("%s\t%s\t%.0f\t%s", brief(t.P50.Median), brief(t.P99.Median),
		t.PerSecond.Median, flushes)
}

func spread(f figure) string {
	return fmt.Sprintf("%.2f (%.2f-%.2f)", f.Median, f.Min, f.Max)
}

// brief formats a number with a sensible number of digits.
func brief(value float64) string {
	switch {
	case value >= 100:
		return fmt.Sprintf("%.0f", value)
	case value >= 10:
		return fmt.Sprintf("%.1f", value)
	case value >= 1:
		return fmt.Sprintf("%.2f", value)
	default:
		return fmt.Sprintf("%.3f", value)
	}
}
