package datapath

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
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
			if have, err := Probe(); err != nil {
				t.Fatal(err)
			} else if c.by == reclaimByWork && !have.Has(Workqueues) {
				t.Skipf("%s: its workqueues are declared otherwise than ours; the agent takes the timer", labtest.NewKernel)
			}
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
		b.orphan(flow(7000))
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
			if n := state().Runs - first; n < 12 { // each table twice
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
	expired := uint64(2 * (100 + 1 + 1)) // flows, an inbound connection, an orphan
	removed := func() error {
		if n := state().Removed; n < expired {
			return fmt.Errorf("%d removed", n)
		}
		return nil
	}
	labtest.Eventually(t, 10*time.Second, removed)
	fires()
	b.checkStates(2, "established")
	if r := state(); r.Removed != expired {
		t.Errorf("%d removed, want %d", r.Removed, expired)
	}
	b.inspect(func(in *Inspector) error {
		n, err := in.Reclaimed()
		if n != expired {
			t.Errorf("readers see %d removed, want %d", n, expired)
		}
		return err
	})
	b.checkBijection(ports(40000, 1000))
	// What keeps the ports for their last owners goes when that time is over.
	if n := b.dead(); n != 2*100 {
		t.Errorf("%d dead entries, want 200", n)
	}
	b.age(121)
	expired += 2 * 100
	labtest.Eventually(t, 10*time.Second, removed)
	if n := b.dead(); n != 0 {
		t.Errorf("%d dead entries left", n)
	}
	b.checkStates(2, "established")
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

// orphan opens a flow and takes its forward half away.
func (b *bench) orphan(p packet.Packet) {
	b.t.Helper()
	b.open1(b.t, func(int) packet.Packet { return p }, 1)
	forward, _ := b.entries()
	for _, e := range forward {
		if e.key.local != netip.AddrPortFrom(p.Src, p.SrcPort) {
			continue
		}
		k := e.key.tuple()
		err := b.objs.Forward6.Delete(k)
		if p.Src.Is4() {
			err = b.objs.Forward4.Delete(masqTuple4{Local: k.Local.W[3], Remote: k.Remote.W[3], Lport: k.Lport, Rport: k.Rport, Proto: k.Proto})
		}
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

// Where room is scarce the kernel keeps no port for its last owner either: a table
// that was full of flows is open to new ones when they have ended.
func TestReclaimMakesRoom(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.BPFTimer)
	const size, room = 1024, 716 // 70 %
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: size, Without: []Feature{Workqueues},
		reclaim: &reclaimTiming{after: 60, period: time.Millisecond}})
	b.apply(loopPolicy(ports(40000, 4*size)))
	for _, flow := range []func(int) packet.Packet{tcpFlow, tcpFlow6} {
		b.open1(t, flow, size)
	}
	b.age(1000)
	if err := b.changeState(func(st *masqState) { st.Heartbeat -= 61 }); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, 20*time.Second, func() error {
		if n := b.dead(); n != 2*room {
			return fmt.Errorf("%d dead entries", n)
		}
		return nil
	})
	b.open1(t, func(i int) packet.Packet { return tcpFlow(2*size + i) }, size-room)
	if n := b.count(policy.DropTableFull); n != 0 {
		t.Errorf("%d new flows found the table full", n)
	}
}

// Who opens the data plane says so before anything else: the timer of an earlier
// agent, which may have had more of the kernel, does not expire what this one walks.
func TestReclaimEndsAtOpen(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{Without: []Feature{Timers}})
	b.apply(loopPolicy(ports(40000, 10)))
	if err := b.changeState(func(st *masqState) { st.Heartbeat -= 1000 }); err != nil {
		t.Fatal(err)
	}
	before, err := monotonicSeconds()
	if err != nil {
		t.Fatal(err)
	}
	b.close()
	b.open()
	st, err := b.state()
	if err != nil {
		t.Fatal(err)
	}
	if int32(st.Heartbeat-before) < 0 {
		t.Errorf("the last heartbeat is %d s old", before-st.Heartbeat)
	}
}

// Two that expire the same flows at the same time, an agent and the kernel, end each
// of them once, and count that once.
func TestReapersMeet(t *testing.T) {
	t.Parallel()
	const flows = 32000 // a multiple of reapBatch
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 32768})
	b.apply(loopPolicy(ports(32768, 32768)))
	b.open1(t, tcpFlow, flows)
	b.age(1000)
	forward, _ := b.entries()
	const threads = 2
	var removed [threads]int
	var arrived atomic.Int32
	parallel(t, b, threads, func(thread int) error {
		defer arrived.Add(flows) // nobody waits for one that failed
		r := reaper{prog: b.objs.Reap}
		for i, e := range forward {
			if i%reapBatch == reapBatch-1 { // the next record fills a run of the program: begin it together
				for arrived.Add(1); int(arrived.Load()) < threads*(i/reapBatch+1); {
					runtime.Gosched()
				}
			}
			if err := r.add(t.Context(), masqReapRecord{Key: e.key.tuple(), Table: reapForward, Percent: 100}); err != nil {
				return err
			}
		}
		removed[thread] = r.removed
		return nil
	})
	t.Logf("removed %v", removed)
	if n := removed[0] + removed[1]; n != flows {
		t.Errorf("%d flows ended, there were %d", n, flows)
	}
	for i := 0; i < flows; i += 1000 {
		var pod masqPod
		a := tcpFlow(i).Src
		if err := b.objs.Pods.Lookup(addrTo(a), &pod); err != nil {
			t.Fatal(err)
		}
		if pod.Flows != 0 {
			t.Errorf("%s: %d flows counted, there are none", a, int32(pod.Flows))
		}
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
	b.fill(flows, 0, in.Devices[0].IPv4, 1000) // established: candidates, but not due
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
