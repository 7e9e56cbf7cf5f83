package datapath

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// programs runs the programs of the loopback device on packets, by hand.
type programs struct{ egress, ingress *ebpf.Program }

func (b *bench) programs() programs {
	return programs{b.objs.EgressEther, b.objs.IngressEther}
}

// send runs the egress program and returns what left; ok is false if nothing did.
func (p programs) send(pkt packet.Packet) (out []byte, ok bool, err error) {
	return run(p.egress, pkt)
}

func run(prog *ebpf.Program, pkt packet.Packet) (out []byte, ok bool, err error) {
	frame := pkt.Build()
	opt := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64)}
	verdict, err := prog.Run(&opt)
	return opt.DataOut, verdict == ^uint32(0), err
}

// flow number i: each has an inner socket of its own.
func tcpFlow(i int) packet.Packet {
	return packet.Packet{
		Src: netip.AddrFrom4([4]byte{10, 0, byte(i / 1000 >> 8), byte(i / 1000)}), SrcPort: uint16(1000 + i%1000),
		Dst: netip.MustParseAddr("198.51.100.1"), DstPort: 443, Proto: packet.TCP, Flags: packet.SYN,
	}
}

func tcpFlow6(i int) packet.Packet {
	p := tcpFlow(i)
	p.Src = netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(i / 1000 >> 8), 15: byte(i / 1000)})
	p.Dst = netip.MustParseAddr("2001:db8:99::1")
	return p
}

// entries reads both halves of all flows.
func (b *bench) entries() (forward, reverse []flowEntry) {
	b.t.Helper()
	for _, t := range b.sweeper.tables {
		for e, err := range t.all(t.forward) {
			if err != nil {
				b.t.Fatal(err)
			}
			forward = append(forward, e)
		}
		for e, err := range t.all(t.reverse) {
			if err != nil {
				b.t.Fatal(err)
			}
			if !e.dead() {
				reverse = append(reverse, e)
			}
		}
	}
	return forward, reverse
}

// checkBijection fails unless forward and reverse entries are the same flows, each
// with an external tuple of its own from the pool.
func (b *bench) checkBijection(pool []uint16) (external map[flowKey]uint16) {
	b.t.Helper()
	forward, reverse := b.entries()
	inner := make(map[flowKey]flowKey)
	for _, e := range reverse {
		inner[e.key] = flowKey{local: e.xlate, remote: e.key.remote, proto: e.key.proto}
	}
	external = make(map[flowKey]uint16)
	owner := make(map[flowKey]flowKey)
	for _, e := range forward {
		k := e.reverseKey()
		if other, taken := owner[k]; taken {
			b.t.Errorf("%v and %v share %v", other, e.key, k)
		}
		owner[k], external[e.key] = e.key, e.xlate.Port()
		if inner[k] != e.key {
			b.t.Errorf("%v has %v, but replies go to %v", e.key, k, inner[k])
		}
		if n := e.xlate.Port(); n < pool[0] || n > pool[len(pool)-1] {
			b.t.Errorf("%v has port %d, not of the pool", e.key, n)
		}
	}
	if len(forward) != len(reverse) {
		b.t.Errorf("%d forward and %d reverse entries", len(forward), len(reverse))
	}
	return external
}

// forgetFlows empties the flow tables.
func (b *bench) forgetFlows() {
	b.t.Helper()
	b.inspect(func(in *Inspector) error {
		_, err := in.Flush(Filter{All: true})
		return err
	})
}

// Many threads open the same few flows at the same time, with fewer ports than
// flows: no two flows get the same external tuple, and a flow that several threads
// open has one port, which every packet of it carries.
func TestPortsManyThreads(t *testing.T) {
	t.Parallel()
	const threads, flows, rounds = 8, 6, 40
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 64})
	for size := 1; size <= 4; size++ {
		pool := ports(40000, size)
		b.apply(loopPolicy(pool))
		progs := b.programs()
		for range rounds {
			type sent struct {
				flow flowKey
				port uint16
			}
			var mu sync.Mutex
			var all []sent
			parallel(t, b, threads, func(thread int) error {
				for i := range flows {
					p := tcpFlow((i + thread) % flows)
					out, ok, err := progs.send(p)
					if err != nil {
						return err
					}
					if ok {
						mu.Lock()
						all = append(all, sent{
							flowKey{netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort), p.Proto},
							binary.BigEndian.Uint16(out[34:])})
						mu.Unlock()
					}
				}
				return nil
			})
			external := b.checkBijection(pool)
			if len(external) != size {
				t.Errorf("pool of %d: %d flows", size, len(external))
			}
			for _, s := range all {
				if external[s.flow] != s.port {
					t.Errorf("pool of %d: %v left with port %d, its mapping has %d", size, s.flow, s.port, external[s.flow])
				}
			}
			if t.Failed() {
				return
			}
			if s := b.sweep(); s.Orphans != 0 {
				t.Errorf("%d orphans", s.Orphans)
			}
			b.forgetFlows()
		}
	}
}

// parallel runs f on n threads inside the namespace, all at once.
func parallel(t testing.TB, b *bench, n int, f func(thread int) error) {
	t.Helper()
	var wg sync.WaitGroup
	start := make(chan struct{})
	errs := make(chan error, n)
	for thread := range n {
		wg.Go(func() {
			errs <- b.ns.Do(func() error { // Do locks the thread
				<-start
				return f(thread)
			})
		})
	}
	close(start)
	wg.Wait()
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
}

// ofOnePod gives all flows the source address of the first, and ports of their own.
func ofOnePod(flow func(int) packet.Packet) func(int) packet.Packet {
	return func(i int) packet.Packet {
		p := flow(0)
		p.SrcPort += uint16(i)
		return p
	}
}

// A pool of up to 2048 ports can be handed out completely towards one remote, to a
// pod that is alone.
func TestPortsSmallPoolsCompletely(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 4096})
	for i, flow := range []func(int) packet.Packet{ofOnePod(tcpFlow), ofOnePod(tcpFlow6)} {
		for _, size := range []int{1, 2, 3, 1000, 2047, 2048} {
			pool := ports(40000, size)
			b.apply(loopPolicy(pool))
			before := b.count(policy.DropNoPort)
			b.open1(t, flow, size)
			if n := b.count(policy.DropNoPort) - before; n != 0 {
				t.Errorf("pool of %d: %d flows had no port", size, n)
			}
			b.checkBijection(pool)
			s := b.sweep()
			want := PortUse{packet.TCP, b.applied.policy.Input().Devices[0].Addr(i == 0), netip.AddrPortFrom(flow(0).Dst, 443), size, size}
			if s.Worst != want || s.Usage[i].Flows != size {
				t.Errorf("pool of %d: worst %+v, usage %+v", size, s.Worst, s.Usage)
			}
			b.open1(t, func(int) packet.Packet { return flow(size) }, 1)
			if n := b.count(policy.DropNoPort) - before; n != 1 {
				t.Errorf("pool of %d: one flow too many: %d drops", size, n)
			}
			b.forgetFlows()
		}
	}
}

// open1 sends the first packet of n flows.
func (b *bench) open1(t testing.TB, flow func(int) packet.Packet, n int) {
	t.Helper()
	progs := b.programs()
	err := b.ns.Do(func() error {
		for i := range n {
			if _, _, err := progs.send(flow(i)); err != nil {
				return fmt.Errorf("flow %d: %w", i, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Of a large pool 97 % can be handed out towards one remote without a failed search,
// and each of the last searches took a bounded number of candidates.
func TestPortsLargePoolNearlyFull(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 32768})
	pool := ports(32768, 32768)
	b.apply(loopPolicy(pool))
	n := len(pool) * 97 / 100
	b.open1(t, tcpFlow, n-1000)
	before := b.searches()
	b.open1(t, func(i int) packet.Packet { return tcpFlow(n - 1000 + i) }, 1000)
	after := b.searches()
	t.Logf("searches within 1, 2, 4 ... candidates: up to 94 %%: %v; from there to 97 %%: %v", before.Attempts, since(before.Attempts, after.Attempts))
	if after.Failures != 0 || sum(after.Attempts) != uint64(n) {
		t.Errorf("%d searches found a port, %d did not", sum(after.Attempts), after.Failures)
	}
	// At 97 % one candidate in 33 is free: half of the searches need more than 16.
	if last := since(before.Attempts, after.Attempts); sum(last[:5]) > 900 || sum(last[:10]) < 999 {
		t.Errorf("the last searches: %v", last)
	}
	if drops := b.count(policy.DropNoPort); drops != 0 {
		t.Errorf("%d of %d flows had no port", drops, n)
	}
	if got := len(b.checkBijection(pool)); got != n {
		t.Errorf("%d flows of %d", got, n)
	}
}

// searches reads how the searches for ports went.
func (b *bench) searches() (s PortSearches) {
	b.t.Helper()
	b.inspect(func(in *Inspector) (err error) {
		s, err = in.PortSearches()
		return err
	})
	return s
}

func since(before, after []uint64) []uint64 {
	out := make([]uint64, len(after))
	for i := range after {
		out[i] = after[i] - before[i]
	}
	return out
}

func sum(list []uint64) (n uint64) {
	for _, v := range list {
		n += v
	}
	return n
}
