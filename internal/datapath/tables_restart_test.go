package datapath

import (
	"maps"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// The seed of the port sequence is pinned: sockets that lose all their mappings get
// the same external ports again, from another agent too.
func TestPortsSurviveRestart(t *testing.T) {
	t.Parallel()
	const flows = 200
	b := newBench(t, labtest.NewNS(t), Options{})
	pool := ports(40000, 5000) // none of it a flow's own port
	in := loopPolicy(pool)
	b.apply(in)
	// One flow at a time: then nobody is in the way of anybody.
	external := func() map[flowKey]uint16 {
		all := make(map[flowKey]uint16)
		progs := b.programs()
		for i := range flows {
			for _, p := range []func(int) packet.Packet{tcpFlow, tcpFlow6} {
				if err := b.ns.Do(func() error { _, _, err := progs.send(p(i)); return err }); err != nil {
					t.Fatal(err)
				}
			}
			maps.Copy(all, b.checkBijection(pool))
			b.forgetFlows()
		}
		return all
	}
	before := external()
	if len(before) != 2*flows {
		t.Fatalf("%d flows", len(before))
	}
	if again := external(); !maps.Equal(before, again) {
		t.Error("other ports after loss of state")
	}
	b.close()
	b.open()
	b.apply(in)
	if again := external(); !maps.Equal(before, again) {
		t.Error("other ports after a restart")
	}
}
