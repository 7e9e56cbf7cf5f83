package datapath

import (
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// eachHook runs a test with all that the kernel has, if tcx is among it, and with
// nothing that 5.10 does not have, and so with clsact.
func eachHook(t *testing.T, f func(t *testing.T, without []Feature, hook Hook)) {
	t.Parallel()
	t.Run("tcx", func(t *testing.T) {
		t.Parallel()
		labtest.Kernel(t, labtest.TCX)
		f(t, nil, HookTCX)
	})
	t.Run("tc", func(t *testing.T) {
		t.Parallel()
		f(t, AllFeatures(), HookTC)
	})
}

// askAll sends real traffic of both families and returns an error unless the world
// saw the wanted source.
func askAll(t testing.TB, topo *lab.Topology, want lab.Pair) error {
	t.Helper()
	for _, server := range topo.WorldAddr.All() {
		s, err := lab.EchoUDP(topo.World, netip.AddrPortFrom(server, 0))
		if err != nil {
			return err
		}
		seen, err := lab.AskUDP(within(t, 5*time.Second), topo.Pods[0], netip.AddrPort{}, s.Addr, []byte("hello"))
		s.Close()
		if err != nil {
			return err
		}
		if seen.Addr() != want.Of(server) {
			return fmt.Errorf("the world saw %s, not %s", seen, want.Of(server))
		}
	}
	return nil
}

func TestAttachBothHooks(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		r := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		r.apply(in)
		r.apply(in) // again changes nothing
		got := r.attachments()
		if len(got) != 1 || got[0].Device != "eth0" || got[0].Hook != hook || got[0].Draining || len(got[0].Ahead) > 0 {
			t.Errorf("attached %+v", got)
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
		r.close()
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Errorf("with the agent down: %v", err)
		}
		r.open()
		if got := r.attachments(); len(got) != 1 || got[0].Hook != hook || got[0].Draining {
			t.Errorf("taken over: %+v", got)
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Errorf("taken over: %v", err)
		}
		r.close()
		remove(t, topo.Node, r.opt.Root)
		if _, err := os.Stat(r.opt.Root); !os.IsNotExist(err) {
			t.Errorf("after remove: %v", err)
		}
		if n := chain(t, topo.Node, "eth0"); n != "" {
			t.Errorf("after remove: %s", n)
		}
	})
}

func remove(t testing.TB, ns *lab.NS, root string) []string {
	t.Helper()
	var removed []string
	err := ns.Do(func() (err error) {
		removed, err = Remove(root)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return removed
}
