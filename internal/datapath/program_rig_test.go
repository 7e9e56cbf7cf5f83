package datapath

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// rig runs the programs on packets by BPF_PROG_TEST_RUN. Nothing is attached: the
// devices eth0 and eth1 exist for their index only.
type rig struct {
	t      testing.TB
	ns     *lab.NS
	d      *Datapath
	device map[string]int
	counts []uint64 // packets by slot, all CPUs together
	recent []uint32 // slots, the ones that moved last in front; before kernel 5.13 only
	held   *bool    // a fragment may be held
}

const rigFlows = 256

func newRig(t testing.TB, without ...Feature) *rig { return newRigFlows(t, rigFlows, without...) }

func newRigFlows(t testing.TB, flows uint32, without ...Feature) *rig {
	t.Helper()
	root := filepath.Join(labtest.BPFFS(t), "bauta")
	r := &rig{t: t, ns: labtest.NewNS(t), device: make(map[string]int), held: new(bool)}
	if err := lab.Link(r.ns, "eth0", r.ns, "eth1", lab.LinkOpts{Down: true}); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []string{"eth0", "eth1"} {
		index, err := r.ns.Index(dev)
		if err != nil {
			t.Fatal(err)
		}
		r.device[dev] = index
	}
	d, err := Open(Options{Root: root, Flows: flows, Without: without, AllowPrivateBPFFS: true})
	if err != nil {
		t.Fatal(err)
	}
	r.d = d
	labtest.Close(t, d.Close)
	r.learn(false)
	r.counts = r.readCounts()
	return r
}

// on returns the rig for a subtest.
func (r *rig) on(t testing.TB) *rig {
	sub := *r
	sub.t = t
	copy(sub.counts, sub.readCounts()) // a subtest that failed may have left some unread
	if r.recent != nil {
		t.Cleanup(func() {
			if !slices.Equal(sub.readEachCount(), sub.counts) {
				t.Error("more than one counter moved in a run")
			}
		})
	}
	return &sub
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// apply puts a policy in force and forgets all flows, and what was excluded before:
// that matters to answers that are under way.
func (r *rig) apply(in policy.Input) *policy.Policy {
	r.t.Helper()
	r.reapply(in)
	r.d.applied.removed = nil
	p := r.reapply(in)
	r.clear()
	return p
}

// reapply puts a policy in force without attaching anything.
func (r *rig) reapply(in policy.Input) *policy.Policy {
	r.t.Helper()
	p, err := policy.Build(in)
	r.must(err)
	next, err := r.d.writePolicy(context.Background(), p)
	r.must(err)
	if r.d.applied != nil {
		r.d.releaseTries(r.d.applied, next)
	}
	r.d.applied = next
	for _, index := range r.device {
		if err := r.d.objs.Devices.Delete(uint32(index)); !errors.Is(err, ebpf.ErrKeyNotExist) {
			r.must(err)
		}
	}
	for _, dev := range in.Devices {
		var v masqDevice
		for i, a := range [2]netip.Addr{dev.IPv4, dev.IPv6} {
			if a.IsValid() {
				v.Addr[i] = addrTo(a)
			}
		}
		r.must(r.d.objs.Devices.Put(uint32(dev.Index), v))
	}
	return p
}

// clear forgets flows and fragments.
func (r *rig) clear() {
	r.t.Helper()
	o := &r.d.objs
	for _, m := range []*ebpf.Map{o.Forward4, o.Forward6, o.Reverse4, o.Reverse6, o.Inbound4, o.Inbound6, o.Fragments, o.Pods, o.Refusals} {
		r.wipe(m)
	}
	if *r.held { // hundreds of places
		r.emptyHeld()
		*r.held = false
	}
}

func (r *rig) wipe(m *ebpf.Map) {
	r.t.Helper()
	key, err := m.NextKeyBytes(nil)
	for r.must(err); key != nil; r.must(err) {
		var next []byte
		// The next key first: from a deleted one the kernel starts over.
		if next, err = m.NextKeyBytes(key); err == nil {
			err = m.Delete(key)
		}
		key = next
	}
}

// learn opens or closes the time in which any arriving TCP packet opens a connection.
func (r *rig) learn(on bool) {
	r.t.Helper()
	now, err := monotonicSeconds()
	r.must(err)
	until := now - 1
	if on {
		until = now + 60
	}
	r.state(func(st *masqState) { st.LearnUntil = until })
}

func (r *rig) state(change func(*masqState)) {
	r.t.Helper()
	var st masqState
	r.must(r.d.objs.Control.Lookup(uint32(0), &st))
	change(&st)
	r.must(r.d.objs.Control.Put(uint32(0), st))
}
