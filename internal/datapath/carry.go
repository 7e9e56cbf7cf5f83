package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// carrier copies a table into its successor.
type carrier func(from, to *ebpf.Map, p pass) error

// pass says what a carrier takes of a table that packets go on changing.
type pass struct {
	since uint32 // second of the monotonic clock, or 0
	// fresh: only entries made since then, and what the new table has stays. Else those
	// that spoke since then, over what the new table has.
	fresh bool
	keep  func(flowEntry) bool // nil: all of them
}

func (p pass) takes(e flowEntry) bool {
	stamp := e.seen
	if p.fresh {
		stamp = e.created
	}
	return (p.since == 0 || int32(stamp-p.since) >= 0) && (p.keep == nil || p.keep(e))
}

// carry makes a carrier from the conversion of an entry. view reads a new entry.
func carry[K1, V1, K2, V2 any](convert func(K1, V1) (K2, V2), view func(K2, V2) flowEntry) carrier {
	return func(from, to *ebpf.Map, p pass) error {
		var keys []K2
		var values []V2
		for b, err := range batches[K1, V1](from) {
			if err != nil {
				return err
			}
			keys, values = keys[:0], values[:0]
			for i := range b.keys {
				k, v := convert(b.keys[i], b.values[i])
				if p.takes(view(k, v)) {
					keys, values = append(keys, k), append(values, v)
				}
			}
			if err := put(to, keys, values, p.fresh); err != nil {
				return fmt.Errorf("copy flow table: %w", err)
			}
		}
		return nil
	}
}

func put[K, V any](to *ebpf.Map, keys []K, values []V, fresh bool) error {
	if !fresh && len(keys) > 0 {
		_, err := to.BatchUpdate(keys, values, nil)
		return err
	}
	for i := range keys { // batches take no BPF_NOEXIST
		if err := to.Update(&keys[i], &values[i], ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
	}
	return nil
}

// empty removes all entries of a table that no program uses.
func empty[K, V any](m *ebpf.Map) error {
	for b, err := range batches[K, V](m) {
		if err == nil && len(b.keys) > 0 {
			_, err = m.BatchDelete(b.keys, nil)
		}
		if err != nil {
			return fmt.Errorf("empty flow table: %w", err)
		}
	}
	return nil
}

func isFull(err error) bool { return errors.Is(err, unix.E2BIG) }
