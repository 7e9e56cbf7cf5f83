package datapath

import (
	"errors"
	"slices"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// counterSlots is the number of counters: by outcome, direction and family.
const counterSlots = policy.OutcomeSlots * 4

func (r *rig) readCounts() []uint64 {
	r.t.Helper()
	keys, cpus := make([]uint32, counterSlots), ebpf.MustPossibleCPU()
	perCPU := make([]masqCounter, counterSlots*cpus)
	var cursor ebpf.MapBatchCursor
	n, err := r.d.objs.Counters.BatchLookup(&cursor, keys, perCPU, nil)
	if errors.Is(err, ebpf.ErrNotSupported) { // before kernel 5.13
		return r.readEachCount()
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		r.t.Fatal(err)
	}
	counts := make([]uint64, counterSlots)
	for i, key := range keys[:n] {
		for _, c := range perCPU[i*cpus : (i+1)*cpus] {
			counts[key] += c.Packets
		}
	}
	return counts
}

// readEachCount reads the counters one by one.
func (r *rig) readEachCount() []uint64 {
	r.t.Helper()
	counts := make([]uint64, counterSlots)
	for slot := range counts {
		counts[slot] = r.readCount(uint32(slot))
	}
	if r.recent == nil {
		for slot := range counterSlots {
			r.recent = append(r.recent, uint32(slot))
		}
	}
	return counts
}

func (r *rig) readCount(slot uint32) (packets uint64) {
	r.t.Helper()
	var perCPU []masqCounter
	r.must(r.d.objs.Counters.Lookup(slot, &perCPU))
	for _, c := range perCPU {
		packets += c.Packets
	}
	return packets
}

// readMoved reads the counters after a run. Where they can't be had at once it stops at
// the first that moved, and the end of the test finds out if others did.
func (r *rig) readMoved(repeat uint32) []uint64 {
	r.t.Helper()
	if r.recent == nil || repeat > 1 {
		return r.readCounts()
	}
	counts := slices.Clone(r.counts)
	for i, slot := range r.recent {
		if counts[slot] = r.readCount(slot); counts[slot] != r.counts[slot] {
			copy(r.recent[1:], r.recent[:i])
			r.recent[0] = slot
			break
		}
	}
	return counts
}

// moved returns by how much the counters moved since it was asked last, all of which
// must be of one direction.
func (r *rig) moved(dir direction) map[policy.Outcome]uint64 {
	r.t.Helper()
	return r.movedTo(dir, r.readCounts())
}

func (r *rig) movedTo(dir direction, counts []uint64) map[policy.Outcome]uint64 {
	r.t.Helper()
	moved := make(map[policy.Outcome]uint64)
	for slot, n := range counts {
		if n == r.counts[slot] {
			continue
		}
		outcome := policy.Outcome(slot / 4)
		if slot/2%2 != int(dir) {
			r.t.Fatalf("%s: %s was counted in the other direction", dir, outcome)
		}
		moved[outcome] += n - r.counts[slot]
		*r.held = *r.held || outcome == policy.HoldFragment || outcome == policy.PassFragment
	}
	copy(r.counts, counts) // shared with the rigs of other subtests
	return moved
}
