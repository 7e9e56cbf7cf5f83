package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// Walks go on in another goroutine while the masquerade address changes: no mapping
// of the address in force is taken for one of an address that has left the node,
// and those of the address before it do end.
func TestWalkDuringApply(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	var in [2]policy.Input
	for i := range in {
		in[i] = loopPolicy(ports(40000, 100))
		in[i].Devices[0].IPv4 = netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)})
		in[i].HostAddrs = []netip.Addr{in[i].Devices[0].IPv4, in[i].Devices[0].IPv6}
	}
	b.apply(in[0])
	// Before a packet can have the new address a walk knows it, and until none can have
	// the old one.
	b.interrupt = func(string) error {
		for i := range in {
			if !b.sweeper.facts.Load().local[in[i].Devices[0].IPv4] {
				t.Errorf("address %d is unknown during Apply", i)
			}
		}
		return nil
	}
	b.apply(in[1])
	b.interrupt = nil
	if b.sweeper.facts.Load().local[in[0].Devices[0].IPv4] {
		t.Error("the old address is still known")
	}
	progs := b.programs()
	type walked struct {
		n, vanished int
		err         error
	}
	stop, walks, done := make(chan struct{}), make(chan struct{}), make(chan walked, 1)
	go func() {
		var w walked
		defer func() { done <- w }()
		for {
			select {
			case <-stop:
				return
			case <-walks: // somebody waits for the end of the walk before
			default:
			}
			s, err := b.Walk(context.Background())
			w.n, w.vanished = w.n+1, w.vanished+s.Vanished
			if err != nil {
				w.err = err
				return
			}
		}
	}()
	err := b.ns.Do(func() error {
		for i := range 40 {
			p, err := policy.Build(in[i%2])
			if err != nil {
				return err
			}
			if err := b.Apply(context.Background(), p); err != nil {
				return err
			}
			flow := tcpFlow(i)
			if _, ok, err := progs.send(flow); err != nil || !ok {
				return fmt.Errorf("round %d: not sent, %v", i, err)
			}
			walks <- struct{}{} // two walks begin: the first, with the mapping there, is over then
			walks <- struct{}{}
			k := flowKey{netip.AddrPortFrom(flow.Src, flow.SrcPort), netip.AddrPortFrom(flow.Dst, flow.DstPort), flow.Proto}
			if e, ok := b.sweeper.tables[0].find(b.objs.Forward4, k); !ok || e.xlate.Addr() != in[i%2].Devices[0].IPv4 {
				return fmt.Errorf("round %d: the mapping is gone: %+v", i, e)
			}
		}
		return nil
	})
	close(stop)
	w := <-done
	if err := errors.Join(err, w.err); err != nil {
		t.Error(err)
	}
	if s := b.sweep(); w.vanished+s.Vanished != 39 || s.Usage[0].Flows != 1 {
		t.Errorf("%d mappings of old addresses ended in %d walks, then %+v", w.vanished, w.n, s)
	}
}

// A walk that began before a device was given up knows nothing of the mappings made
// meanwhile: its result detaches nothing.
func TestDrainNeedsALaterWalk(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy(t, topo)
	walk := func() Swept {
		t.Helper()
		s, err := b.Walk(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	drain := func(s Swept, left int) {
		t.Helper()
		if err := topo.Node.Do(func() error { return b.Drain(s) }); err != nil {
			t.Error(err)
		}
		if got := b.attachments(); len(got) != left {
			t.Errorf("attached %+v", got)
		}
	}
	if s := walk(); !reflect.DeepEqual(s, Swept{}) {
		t.Errorf("before the first policy: %+v", s)
	}
	b.apply(in)
	early := walk()
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Error(err)
	}
	in.Devices = nil
	b.apply(in)
	drain(early, 1)
	drain(walk(), 1)
	b.forgetFlows()
	drain(early, 1)
	drain(walk(), 0)

	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	b.apply(nodePolicy(t, topo))
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Error(err)
	}
	b.age(1 << 20)
	if _, err := b.Walk(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("walk of an agent that ends: %v", err)
	}
}
