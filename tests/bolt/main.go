// Writes the database of a Go snapshotter with containerd's own package, and
// prints what that package finds in it.
//
// Reads a step in JSON from each line of standard input, takes the steps in
// order, and then prints everything as JSON.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"sort"
	"time"

	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/storage"
	bolt "go.etcd.io/bbolt"
)

// step is one change of the database.
type step struct {
	Do     string            `json:"do"`
	Key    string            `json:"key"`
	Name   string            `json:"name"`
	Parent string            `json:"parent"`
	Labels map[string]string `json:"labels"`
	Size   int64             `json:"size"`
	Inodes int64             `json:"inodes"`
}

// snapshot is one snapshot as the package finds it.
type snapshot struct {
	ID      string            `json:"id"`
	Name    string            `json:"name"`
	Parent  string            `json:"parent"`
	Kind    string            `json:"kind"`
	Created int64             `json:"created"`
	Updated int64             `json:"updated"`
	Labels  map[string]string `json:"labels"`
	Size    int64             `json:"size"`
	Inodes  int64             `json:"inodes"`
}

// listing is all that the package finds.
type listing struct {
	Snapshots []snapshot `json:"snapshots"`
	Sequence  uint64     `json:"sequence"`
}

var (
	pageSize       = flag.Int("page-size", 0, "of a new file; 0 is the machine's")
	perTransaction = flag.Int("per-transaction", 1, "how many steps are one transaction")
	hold           = flag.Bool("hold", false, "keep the file open until killed")
)

func main() {
	flag.Parse()
	if err := run(flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(path string) error {
	if *pageSize != 0 {
		db, err := bolt.Open(path, 0o600, &bolt.Options{PageSize: *pageSize})
		if err != nil {
			return err
		}
		if err := db.Close(); err != nil {
			return err
		}
	}
	store, err := storage.NewMetaStore(path)
	if err != nil {
		return err
	}
	steps, err := read()
	if err != nil {
		return err
	}
	for len(steps) > 0 {
		count := *perTransaction
		if count > len(steps) {
			count = len(steps)
		}
		if err := transact(store, steps[:count]); err != nil {
			return err
		}
		steps = steps[count:]
	}
	found, err := list(store)
	if err != nil {
		return err
	}
	if !*hold {
		if err := store.Close(); err != nil {
			return err
		}
		if found.Sequence, err = sequence(path); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		return err
	}
	for *hold {
		time.Sleep(time.Hour)
	}
	return nil
}

func read() ([]step, error) {
	var steps []step
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var next step
		if err := json.Unmarshal(lines.Bytes(), &next); err != nil {
			return nil, err
		}
		steps = append(steps, next)
	}
	return steps, lines.Err()
}

func transact(store *storage.MetaStore, steps []step) error {
	ctx, transaction, err := store.TransactionContext(context.Background(), true)
	if err != nil {
		return err
	}
	for _, next := range steps {
		if err := take(ctx, next); err != nil {
			_ = transaction.Rollback()
			return fmt.Errorf("%s %s%s: %w", next.Do, next.Key, next.Name, err)
		}
	}
	return transaction.Commit()
}

func take(ctx context.Context, next step) error {
	labels := snapshots.WithLabels(next.Labels)
	var err error
	switch next.Do {
	case "prepare":
		_, err = storage.CreateSnapshot(ctx, snapshots.KindActive, next.Key, next.Parent, labels)
	case "view":
		_, err = storage.CreateSnapshot(ctx, snapshots.KindView, next.Key, next.Parent, labels)
	case "commit":
		usage := snapshots.Usage{Size: next.Size, Inodes: next.Inodes}
		_, err = storage.CommitActive(ctx, next.Key, next.Name, usage, labels)
	case "update":
		info := snapshots.Info{Name: next.Key, Labels: next.Labels}
		_, err = storage.UpdateInfo(ctx, info, "labels")
	case "remove":
		_, _, err = storage.Remove(ctx, next.Key)
	default:
		err = fmt.Errorf("no such step")
	}
	return err
}

func list(store *storage.MetaStore) (listing, error) {
	var found listing
	ctx, transaction, err := store.TransactionContext(context.Background(), false)
	if err != nil {
		return found, err
	}
	defer func() { _ = transaction.Rollback() }()
	// Without a bucket, there is nothing to walk through.
	_ = storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
		id, _, usage, err := storage.GetInfo(ctx, info.Name)
		found.Snapshots = append(found.Snapshots, snapshot{
			ID:      id,
			Name:    info.Name,
			Parent:  info.Parent,
			Kind:    info.Kind.String(),
			Created: info.Created.UnixNano(),
			Updated: info.Updated.UnixNano(),
			Labels:  info.Labels,
			Size:    usage.Size,
			Inodes:  usage.Inodes,
		})
		return err
	})
	sort.Slice(found.Snapshots, func(i, j int) bool {
		return found.Snapshots[i].Name < found.Snapshots[j].Name
	})
	return found, nil
}

// sequence is the last id that was given out, which the package does not
// return.
func sequence(path string) (uint64, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer func() { _ = db.Close() }()
	var last uint64
	err = db.View(func(tx *bolt.Tx) error {
		if all := tx.Bucket([]byte("v1")); all != nil {
			last = all.Bucket([]byte("snapshots")).Sequence()
		}
		return nil
	})
	return last, err
}
