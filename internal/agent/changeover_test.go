package agent

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// fakeOld is an old side with connections that end by and by.
type fakeOld struct {
	mu      sync.Mutex
	left    int
	walks   int
	removed bool
	err     error
}

func (o *fakeOld) SetTunnels([]datapath.Tunnel) error { return nil }
func (o *fakeOld) Walk(context.Context) (datapath.Swept, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.walks++
	return datapath.Swept{}, nil
}
func (o *fakeOld) Left(context.Context, datapath.Swept) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.left, nil
}
func (o *fakeOld) Remove(context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.removed = true
	}
	return o.err
}
func (o *fakeOld) Close() error { return nil }
func (o *fakeOld) mode() string { return ModeBPF }

func (o *fakeOld) set(change func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change()
}

func (o *fakeOld) gone() (removed bool) {
	o.set(func() { removed = o.removed })
	return removed
}

func (o *fakeOld) walked() (n int) {
	o.set(func() { n = o.walks })
	return n
}

// newChangeBench is a loop in iptables mode that takes the place of eBPF mode.
func newChangeBench(t *testing.T, old *fakeOld, moveErr *error) (*bench, *changeover) {
	t.Helper()
	b, r, n := newRuleBench(t, "drain-timeout=1h")
	b.earlier.applied = true
	c := &changeover{backend: n, old: old, moving: &modeSwitch{}, timeout: b.cfg.DrainTimeout, log: quiet}
	c.move = func(ctx context.Context) (switched, error) {
		old.mu.Lock()
		defer old.mu.Unlock()
		if *moveErr != nil {
			return switched{}, *moveErr
		}
		return switched{Moved: 7, Left: old.left}, r.Apply(ctx, c.policy)
	}
	b.loop.changeover, b.loop.kernel, b.loop.flows = c, c, c
	return b, c
}

// The old side is removed when its last connection has ended, and the status and
// policy.json show how many there are.
func TestChangeoverDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		old := &fakeOld{left: 3}
		moveErr := errors.New("no memory")
		b, _ := newChangeBench(t, old, &moveErr)
		b.run(t, func() {
			after(5500 * time.Millisecond)
			s := b.state(t)
			if want := "take over from BPF mode: no memory"; s.Agent.Error != want || s.Agent.Ready || s.Draining != nil || old.walked() > 0 {
				t.Errorf("%q, want %q; %+v, %d walks", s.Agent.Error, want, s.Draining, old.walked())
			}
			old.set(func() { moveErr = nil })
			after(10 * time.Second)
			if s := b.state(t); !s.Agent.Ready || s.Draining == nil || s.Draining.Mode != ModeBPF || s.Draining.Connections != 3 || old.walked() == 0 {
				t.Errorf("%+v, %d walks", s.Draining, old.walked())
			}
			old.set(func() { old.left = 1 })
			after(6 * time.Second)
			f, err := ReadPolicyFile(b.runDir)
			if s := b.state(t); s.Draining == nil || s.Draining.Connections != 1 || err != nil || !f.Draining.same(s.Draining) && !f.Draining.Since.Equal(s.Draining.Since) {
				t.Errorf("%+v, policy.json %+v %v", s.Draining, f.Draining, err)
			}
			old.set(func() { old.left, old.err = 0, errors.New("busy") })
			after(6 * time.Second)
			if s := b.state(t); s.Draining == nil || old.gone() {
				t.Errorf("%+v, removed %v", s.Draining, old.gone())
			}
			old.set(func() { old.err = nil })
			after(6 * time.Second)
			walks := old.walked()
			if s := b.state(t); s.Draining != nil || !old.gone() {
				t.Errorf("%+v, removed %v", s.Draining, old.gone())
			}
			if f, err := ReadPolicyFile(b.runDir); err != nil || f.Draining != nil {
				t.Errorf("policy.json: %+v %v", f.Draining, err)
			}
			if after(20 * time.Second); old.walked() != walks {
				t.Error("walks through what is gone")
			}
		})
	})
}

// What does not end is ended in time, counted from the change, not from the last start.
func TestChangeoverEndsInTime(t *testing.T) {
	for _, since := range []time.Duration{0, 50 * time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			old := &fakeOld{left: 3}
			var moveErr error
			b, c := newChangeBench(t, old, &moveErr)
			if since > 0 {
				c.begun = time.Now().Add(-since)
			}
			b.run(t, func() {
				after(time.Hour - since - time.Minute)
				if old.gone() {
					t.Error("removed too early")
				}
				after(time.Minute + 10*time.Second)
				if !old.gone() {
					t.Error("not removed in time")
				}
			})
		})
	}
}

// What the programs still have when they go, or what has ended there, must not stay known to
// netfilter as not translated: it would leave like that.
func TestReleased(t *testing.T) {
	n := onPrograms(t, true)
	n.refuse = map[flowKey]bool{keyOf(n.talking[0]): true, keyOf(n.talking[1]): true}
	sw := n.modeSwitch()
	if out, err := sw.toRules(t.Context()); err != nil || out.Left != 2 {
		t.Fatalf("%+v, %v", out, err)
	}
	before := []datapath.Flow{n.mappings[keyOf(n.talking[0])], n.mappings[keyOf(n.talking[1])]}
	ended := keyOf(n.talking[0])
	n.talking = n.talking[1:]
	delete(n.mappings, ended)
	flows, _ := n.Flows(t.Context())
	if err := sw.release(t.Context(), without(before, flows)); err != nil {
		t.Fatal(err)
	}
	if _, ok := n.entries[ended]; ok {
		t.Error("netfilter still knows a connection that the programs have no more")
	}
	n.talking = n.talking[1:] // the other one ends too
	if err := sw.releaseAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	for key, c := range n.entries {
		if c.Xlate == c.Src {
			t.Errorf("%v is not translated", key)
		}
	}
	if len(n.entries) != switchFlows-2 {
		t.Errorf("%d entries of connections that were moved", len(n.entries))
	}
}

// With every source a candidate, connections of the node are still no mappings.
func TestReachable(t *testing.T) {
	node := netip.MustParseAddr("192.0.2.1")
	in := policy.Input{HostAddrs: []netip.Addr{node}, Devices: []policy.Device{{Name: "eth0", Index: 2, IPv4: node}}}
	for src, want := range map[string]bool{"10.0.1.5:40000": true, "192.0.2.1:40000": false} {
		f := conntrack.Flow{Proto: 6, Src: netip.MustParseAddrPort(src), Xlate: netip.AddrPortFrom(node, 1024)}
		if got := reachable(in)(f); got != want {
			t.Errorf("%s: %v, want %v", src, got, want)
		}
	}
}
