package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
	"bauta.dev/bauta/test/cluster/talk"
)

// connections is how many of each kind a load keeps open.
const connections = 30

// A flowSet is connections of one kind, and new ones all the time.
type flowSet struct {
	name    string
	report  func() (talk.Report, error)
	release func() (talk.Report, error)
	want    netip.Addr // the source that the server sees
}

// load is traffic of all kinds that must not notice what happens to Bauta.
type load []flowSet

// startLoad starts traffic from the pods of the nodes to the outside, to a pod of
// another node if there are several, and from the outside into a pod of the first.
func startLoad(t *testing.T, nodes ...int) load {
	t.Helper()
	var l load
	for _, i := range nodes {
		for _, a := range cluster.World.All() {
			l = append(l, hold(t, podOn[i], netip.AddrPortFrom(a, cluster.EchoPort), node(i).Addr.Of(a)))
		}
	}
	if len(nodes) > 1 {
		a, b := podOn[nodes[0]], podOn[nodes[1]]
		l = append(l, hold(t, a, netip.AddrPortFrom(b.Addr.V4, b.Port), a.Addr.V4))
	}
	if nodes[0] == 0 {
		to := netip.AddrPortFrom(node(0).Addr.V4, nodePortHere)
		h, err := talk.Start(t.Context(), shared.Fabric.Dial, to.String(), connections)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Stop() })
		l = append(l, flowSet{
			"the outside to " + to.String(),
			func() (talk.Report, error) { return h.Report(), nil },
			func() (talk.Report, error) { return h.Stop(), nil },
			cluster.Gateway.V4,
		})
	}
	return l
}

func hold(t *testing.T, p *cluster.Pod, to netip.AddrPort, want netip.Addr) flowSet {
	t.Helper()
	name := fmt.Sprintf("%s-%s", t.Name(), to.Addr())
	if err := p.Hold(t.Context(), name, to, connections); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() { p.Release(ctx, name) }) // there is none unless the test has failed
	return flowSet{
		fmt.Sprintf("%s to %s", p.Name, to),
		func() (talk.Report, error) { return p.Held(ctx, name) },
		func() (talk.Report, error) { return p.Release(ctx, name) },
		want,
	}
}

// alive waits until all connections have been used again, and new ones were made: a
// connection that hangs would otherwise look well.
func (l load) alive(t *testing.T) {
	t.Helper()
	for _, f := range l {
		before, err := f.report()
		if err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		wait(t, 20*time.Second, func() error {
			r, err := f.report()
			if err != nil {
				return err
			}
			if r.Beats < before.Beats+3*r.Open || r.Fresh < before.Fresh+3 {
				return fmt.Errorf("%s: beats %d then %d, new connections %d then %d; broken: %q",
					f.name, before.Beats, r.Beats, before.Fresh, r.Fresh, r.Broken)
			}
			return nil
		})
	}
}

// unharmed ends the load and fails the test if a connection broke or a new one failed.
func (l load) unharmed(t *testing.T) {
	t.Helper()
	l.alive(t)
	for _, f := range l {
		r, err := f.release()
		if err != nil {
			t.Errorf("%s: %v", f.name, err)
			continue
		}
		if r.Open != connections || r.Failed > 0 {
			t.Errorf("%s: %d of %d connections left; %d failures, first %q", f.name, r.Open, connections, r.Failed, r.Broken)
		}
		if len(r.Sources) != 1 || r.Sources[0] != f.want {
			t.Errorf("%s: sources %v, want %s only", f.name, r.Sources, f.want)
		}
		t.Logf("%s: %d exchanges over %d connections, %d new ones", f.name, r.Beats, r.Open, r.Fresh)
	}
}
