package e2e_test

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// A pod that takes all the ports it can get towards one remote leaves its neighbor's
// connections there possible, and no slower than twice what they were.
func TestFloodedNeighbor(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{Pods: 2})
	world := server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4))
	// connects says how long the neighbor's connections take, in the middle.
	connects := func() time.Duration {
		t.Helper()
		took := make([]time.Duration, 100)
		for i := range took {
			start := time.Now()
			c, err := lab.DialTCP(within(t, 10*time.Second), n.Pods[1], netip.AddrPort{}, world)
			if err != nil {
				t.Fatalf("connection %d of the neighbor: %v, counts %v", i, err, n.counts())
			}
			took[i] = time.Since(start)
			c.SetLinger(0)
			c.Close()
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	// Segments of connections that nobody knows: each makes a mapping, and the world
	// only says that it knows none either.
	raw := newRawSender(t, n.Pods[0])
	port := uint16(0)
	flood := func(flows int) error {
		for range flows {
			port++
			p := packet.Packet{Link: packet.Raw, Src: n.PodAddrs[0].V4, Dst: world.Addr(), Proto: packet.TCP,
				SrcPort: port, DstPort: world.Port(), Flags: packet.ACK, Seq: 1, Ack: 1}
			if err := raw.send(p.Build()); err != nil {
				return err
			}
		}
		return nil
	}
	// The flooding pod is alone and takes all it gets; then the neighbor comes.
	labtest.Eventually(t, 60*time.Second, func() error {
		must(t, flood(1000))
		if c := n.counts(); c["drop-no-port"] == 0 {
			return fmt.Errorf("never refused: %v", c)
		}
		return nil
	})
	quiet := connects()
	var flooding sync.WaitGroup
	defer flooding.Wait()
	stop := make(chan struct{})
	defer close(stop)
	flooding.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if err := flood(50); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	during := connects()
	t.Logf("a connection of the neighbor: %v, during the flood %v; counts %v", quiet, during, n.counts())
	// Two processors serve the flood too.
	if during > 2*quiet+2*time.Millisecond {
		t.Errorf("a connection of the neighbor takes %v during the flood, was %v", during, quiet)
	}
}
