package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
)

// What is read here costs the same however many flows there are: a scraper asks again and again.

// Limits is how many flows, and connections opened from outside, the tables of each
// family hold: the limits of Usage without the counts, which take a walk.
func (i *Inspector) Limits() (out [2]Usage) {
	for n, t := range i.tables {
		out[n].Limit, out[n].InboundLimit = int(t.forward.MaxEntries()), int(t.inbound.MaxEntries())
	}
	return out
}

// Reclaimed is how many entries the kernel itself has ended, while no agent ran.
func (i *Inspector) Reclaimed() (uint64, error) {
	m := i.maps[pinReclaim]
	if m == nil {
		return 0, nil // a table of the previous layout
	}
	var r masqReclaimState
	if err := m.Lookup(uint32(0), &r); err != nil {
		return 0, fmt.Errorf("read reclaim: %w", err)
	}
	return r.Removed, nil
}

// Pod is a source address that has mappings, or asked for one.
type Pod struct {
	Addr    netip.Addr
	Flows   int
	Refused uint64 // new flows
}

// Pods returns the source addresses with the most mappings, at most so many, the largest
// first. It reads the table of all of them, 16384 at most.
func (i *Inspector) Pods(most int) ([]Pod, error) {
	if i.old {
		return nil, nil
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(i.root, pinPods), nil)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("open pinned table %s: %w", pinPods, err)
	}
	defer m.Close()
	var all []Pod
	err = eachEntry(m, func(k masqAddr, v masqPod) bool {
		// For a moment a count may be below zero: a flow ends before it is counted.
		all = append(all, Pod{addrFrom(k), max(int(int32(v.Flows)), 0), uint64(v.Refused)})
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read pods: %w", err)
	}
	slices.SortFunc(all, func(a, b Pod) int {
		return cmp.Or(b.Flows-a.Flows, cmp.Compare(b.Refused, a.Refused), a.Addr.Compare(b.Addr))
	})
	return all[:min(most, len(all))], nil
}
