package datapath

import (
	"github.com/cilium/ebpf"
)

// flows returns the entries of one kind of table of both families.
func (r *rig) flows(pick func(flowTables) *ebpf.Map) []flowEntry {
	r.t.Helper()
	var out []flowEntry
	for _, t := range r.d.sweeper.tables {
		seq := t.all(pick(t))
		if pick(t) == t.inbound {
			seq = t.allInbound()
		}
		for e, err := range seq {
			r.must(err)
			out = append(out, e)
		}
	}
	return out
}

func forwardTable(t flowTables) *ebpf.Map { return t.forward }
func reverseTable(t flowTables) *ebpf.Map { return t.reverse }

func inboundTable(t flowTables) *ebpf.Map { return t.inbound }

// drop removes every entry of a kind of table, behind the data plane's back.
func (r *rig) drop(pick func(flowTables) *ebpf.Map) {
	r.t.Helper()
	for _, t := range r.d.sweeper.tables {
		r.wipe(pick(t))
	}
}

// age moves the clock of every entry of a kind of table back by some seconds.
func (r *rig) age(pick func(flowTables) *ebpf.Map, seconds uint32) {
	r.t.Helper()
	for _, t := range r.d.sweeper.tables {
		// The keys first: a replaced element moves to the head of its bucket, and a walk could
		// go round between two of them for ever.
		var keys [][]byte
		key, err := pick(t).NextKeyBytes(nil)
		for ; err == nil && key != nil; key, err = pick(t).NextKeyBytes(key) {
			keys = append(keys, key)
		}
		r.must(err)
		for _, key := range keys {
			value, err := pick(t).LookupBytes(key)
			r.must(err)
			// seen is the first word of every value.
			seen := nativeEndian.Uint32(value) - seconds
			nativeEndian.PutUint32(value, seen)
			r.must(pick(t).Put(key, value))
		}
	}
}
