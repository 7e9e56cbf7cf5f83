package datapath

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// The kernel refuses a write of Apply, at each kind of table: the old policy stays
// in force as a whole, and the next Apply makes good (an AWS agent lost rules so:
// aws-network-policy-agent issue 686).
func TestApplyMapErrors(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	lists := [2][]policy.Rule{prefixes(16, 100), prefixes(17, 100)}
	in := loopPolicy(ports(40000, 1000))
	in.NonMasq = lists[0]
	b.apply(in)
	// readOnly is the table with a descriptor that the kernel takes no writes from.
	readOnly := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(b.opt.Root, name), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, m.Close)
		return m
	}
	force := 0
	for _, c := range []struct {
		name string
		swap func() (undo func())
	}{
		{"create table", func() func() {
			spec := b.trie
			b.trie = spec.Copy()
			b.trie.Flags = 0 // such a table must be unallocated
			return func() { b.trie = spec }
		}},
		{"fill table", func() func() {
			spec := b.trie
			b.trie = spec.Copy()
			b.trie.Flags |= unix.BPF_F_RDONLY
			return func() { b.trie = spec }
		}},
		{"policies", func() func() {
			m := b.objs.Policies
			b.objs.Policies = readOnly("policies")
			return func() { b.objs.Policies = m }
		}},
		{"settings", func() func() {
			m := b.objs.Settings
			b.objs.Settings = readOnly("settings")
			return func() { b.objs.Settings = m }
		}},
		{"control", func() func() {
			m := b.objs.Control
			b.objs.Control = readOnly("control")
			return func() { b.objs.Control = m }
		}},
	} {
		check := func(when string) {
			t.Helper()
			// 100 prefixes, of which 3 are asked for.
			listed, other := b.judge(lists[force]), b.judge(lists[1-force])
			if fmt.Sprint(listed, other) != fmt.Sprint(map[policy.Outcome]int{policy.PassNonMasq: 3}, map[policy.Outcome]int{policy.MasqNew: 3}) {
				t.Errorf("%s: %s: a mixture: %v of the list in force, %v of the other one", c.name, when, listed, other)
			}
		}
		in.NonMasq = lists[1-force]
		undo := c.swap()
		err := b.tryApply(in)
		undo()
		if err == nil {
			t.Fatalf("%s: applied", c.name)
		}
		check("refused")
		b.apply(in)
		force = 1 - force
		check("applied")
	}
}

// The kernel refuses a flow's entry for a reason other than a full table: the packet
// is dropped, with a reason of its own, and no half of the mapping stays. The node's
// own packet passes.
func TestProgramMapErrors(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	good := r.d.objs.EgressEther
	for _, table := range []string{"forward", "reverse"} {
		t.Run(table, func(t *testing.T) {
			r := r.on(t)
			r.d.objs.EgressEther = r.egressWithout(table)
			defer func() { r.d.objs.EgressEther = good }()
			r.apply(r.familyInput())
			eachFamily(t, r, func(r *rig, f family) {
				for _, k := range f.opening() {
					r.expect(egress, k.p, policy.DropMapError)
				}
				r.expect(egress, f.tcp(packet.ACK), policy.DropMapError)
				r.expect(egress, f.udp().From(f.node, keptPort), policy.PassHost)
				if n := len(r.flows(forwardTable)) + len(r.flows(reverseTable)); n != 0 {
					t.Errorf("%d entries stay", n)
				}
			})
		})
	}
}

// egressWithout loads the program for packets that leave with a table for prefixes
// in the place of one of flows: the kernel finds nothing there and refuses to insert.
func (r *rig) egressWithout(table string) *ebpf.Program {
	r.t.Helper()
	spec, err := loadMasq()
	r.must(err)
	r.must(r.d.features.set(spec))
	maps := r.d.objs.byName()
	for name, m := range maps {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	for _, name := range []string{table + "4", table + "6"} {
		delete(maps, name)
		m := spec.Maps[name]
		m.Type, m.Flags, m.Pinning = ebpf.LPMTrie, unix.BPF_F_NO_PREALLOC, ebpf.PinNone
	}
	var load struct {
		Egress *ebpf.Program `ebpf:"egress_ether"`
	}
	r.must(spec.LoadAndAssign(&load, &ebpf.CollectionOptions{MapReplacements: maps}))
	labtest.Close(r.t, load.Egress.Close)
	return load.Egress
}
