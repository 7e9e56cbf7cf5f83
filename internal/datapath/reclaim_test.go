package datapath

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// Without an agent the kernel expires flows by the same rules: what is past its timer
// goes, in both families, and what lives stays. While an agent sweeps it does nothing.
// The next agent replaces the program; the timer goes with the data plane.
func TestReclaim(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		without []Feature
		need    labtest.Feature
		by      uint32
	}{
		{"workqueue", nil, labtest.BPFWork, reclaimByWork},
		{"timer", []Feature{Workqueues}, labtest.BPFTimer, reclaimByTimer},
	} {
		t.Run(c.name, func(t *testing.T) {
			labtest.Kernel(t, c.need)
			reclaimStory(t, c.without, c.by)
		})
	}
}

func reclaimStory(t *testing.T, without []Feature, by uint32) {
	b := newBench(t, labtest.NewNS(t), Options{Without: without, reclaim: &reclaimTiming{after: 60, period: 10 * time.Millisecond}})
	b.apply(loopPolicy(ports(40000, 1000)))
	for _, flow := range []func(int) packet.Packet{tcpFlow, tcpFlow6} {
		b.talk(flow(5000), false, []step{{flags: syn}, {true, syn | ack}, {flags: ack}})
		b.open1(t, flow, 100)
		from := flow(6000)
		b.talk(from, true, []step{{back: true, flags: syn}})
	}
	b.sweep()
	b.age(1000) // longer than all timers but that of established TCP
	state := func() (r masqReclaimState) {
		t.Helper()
		if err := b.objs.Reclaim.Lookup(uint32(0), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	fires := func() {
		t.Helper()
		first := state().Runs
		labtest.Eventually(t, 10*time.Second, func() error {
			if n := state().Runs - first; n < 8 {
				return fmt.Errorf("fired %d times", n)
			}
			return nil
		})
	}
	fires()
	if r := state(); r.By != by || r.Removed != 0 {
		t.Errorf("with an agent: %+v", r)
	}
	if err := b.changeState(func(st *masqState) { st.Heartbeat -= 61 }); err != nil {
		t.Fatal(err)
	}
	const expired = 2 * (100 + 1)
	labtest.Eventually(t, 10*time.Second, func() error {
		if n := state().Removed; n < expired {
			return fmt.Errorf("%d removed", n)
		}
		return nil
	})
	fires()
	b.checkStates(2, "established")
	if r := state(); r.Removed != expired {
		t.Errorf("%d removed, want %d", r.Removed, expired)
	}
	b.checkBijection(ports(40000, 1000))
	// Without any process at all, and for the next one.
	b.close()
	b.open()
	b.apply(loopPolicy(ports(40000, 1000)))
	fires()
	if r := state(); r.By != by {
		t.Errorf("after a restart: %+v", r)
	}
}

// A kernel without timers: no program that it would refuse is loaded, and readers say so.
func TestReclaimNot(t *testing.T) {
	t.Parallel()
	for _, missing := range []Feature{Timers, ForEach} {
		b := newBench(t, labtest.NewNS(t), Options{Without: []Feature{missing}})
		b.apply(loopPolicy(ports(40000, 10)))
		b.inspect(func(in *Inspector) error {
			if got := in.reclaimTier(); got != "no expiry without the agent" {
				t.Errorf("without %s: %s", missing, got)
			}
			return nil
		})
		if b.armed {
			t.Errorf("armed without %s", missing)
		}
	}
}

// A walk looks at a number of candidates only; the next ones go on behind them.
func TestReclaimInParts(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.BPFTimer)
	const batch, flows = 16384, 3 * 16384
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 65536, Without: []Feature{Workqueues},
		reclaim: &reclaimTiming{after: 60, period: time.Millisecond}})
	in := loopPolicy(ports(32768, 32768))
	b.apply(in)
	b.fill(flows, in.Devices[0].IPv4, 1000) // established: candidates, but not due
	var skips []uint32
	if err := b.changeState(func(st *masqState) { st.Heartbeat -= 61 }); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 20*time.Second, func() error {
		var r masqReclaimState
		if err := b.objs.Reclaim.Lookup(uint32(0), &r); err != nil {
			t.Fatal(err)
		}
		if r.Turn == 0 && !slices.Contains(skips, r.Skip) {
			skips = append(skips, r.Skip)
		}
		if !slices.Contains(skips, batch) || !slices.Contains(skips, 2*batch) || r.Turn == 0 {
			return fmt.Errorf("seen %d, %+v", skips, r)
		}
		return nil
	})
	b.age(8000) // 9000 s: all due
	labtest.Eventually(t, 20*time.Second, func() error {
		if forward, _ := b.entries(); len(forward) > 0 {
			return fmt.Errorf("%d flows left", len(forward))
		}
		return nil
	})
}
