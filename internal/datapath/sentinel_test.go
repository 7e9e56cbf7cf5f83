package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// program loads a program of somebody else.
func program(t testing.TB, ins asm.Instructions) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "foreign", Type: ebpf.SchedCLS, License: "GPL", Instructions: ins})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// endsChain lets every packet leave, unseen by the programs behind it.
func endsChain(t testing.TB) *ebpf.Program {
	return program(t, asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()})
}

// rewrites gives every packet a source of its own.
func rewrites(t testing.TB, source lab.Pair) *ebpf.Program {
	const protocol = 16 // in struct __sk_buff
	ins := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for i, a := range source.All() {
		b := a.AsSlice()
		for n := 0; n < len(b); n += 4 {
			ins = append(ins, asm.StoreImm(asm.RFP, int16(n-16), int64(int32(nativeEndian.Uint32(b[n:]))), asm.Word))
		}
		ether := [...]uint16{unix.ETH_P_IP, unix.ETH_P_IPV6}[i]
		ins = append(ins,
			asm.LoadMem(asm.R2, asm.R6, protocol, asm.Word),
			asm.JNE.Imm(asm.R2, int32(swapPort(ether)), fmt.Sprintf("skip%d", i)),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Imm(asm.R2, [...]int32{14 + 12, 14 + 8}[i]),
			asm.Mov.Reg(asm.R3, asm.RFP),
			asm.Add.Imm(asm.R3, -16),
			asm.Mov.Imm(asm.R4, int32(len(b))),
			asm.Mov.Imm(asm.R5, 0),
			asm.FnSkbStoreBytes.Call(),
			asm.Mov.Imm(asm.R0, 0).WithSymbol(fmt.Sprintf("skip%d", i)))
	}
	return program(t, append(ins, asm.Mov.Imm(asm.R0, -1), asm.Return()))
}

// foreign attaches a program of somebody else to eth0 at egress: at the head or the
// tail of a tcx chain, or as a filter.
func (b *bench) foreign(hook Hook, prog *ebpf.Program, head bool) {
	b.t.Helper()
	index, err := b.ns.Index("eth0")
	if err != nil {
		b.t.Fatal(err)
	}
	if hook == HookTCX {
		anchor := link.Tail()
		if head {
			anchor = link.Head()
		}
		attachForeign(b.t, b.ns, index, prog, anchor)
		return
	}
	priority := uint16(100)
	if head {
		priority = 1
	}
	err = b.ns.Do(func() error {
		f := &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: filterParent(egress), Handle: 1, Priority: priority, Protocol: unix.ETH_P_ALL},
			Fd:          prog.FD(), Name: "foreign", DirectAction: true,
		}
		b.t.Cleanup(func() { b.ns.Do(func() error { return netlink.FilterDel(f) }) })
		return netlink.FilterAdd(f)
	})
	if err != nil {
		b.t.Fatal(err)
	}
}

// leaks are the sum of all devices and the samples, as a reader sees them.
func (b *bench) leaks() (sum uint64, samples []Leak) {
	b.t.Helper()
	b.inspect(func(in *Inspector) error {
		devices, list, err := in.Leaks()
		for _, d := range devices {
			sum += d.Packets
		}
		samples = list
		return err
	})
	return sum, samples
}

// sendAll sends a datagram of the pod to the world in both families; nobody answers.
func sendAll(t testing.TB, topo *lab.Topology) {
	t.Helper()
	for _, world := range topo.WorldAddr.All() {
		c, err := lab.DialUDP(t.Context(), topo.Pods[0], netip.AddrPort{}, netip.AddrPortFrom(world, 9))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("to the world")); err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
}

// awaitLeaks waits until both families have leaked.
func (b *bench) awaitLeaks(topo *lab.Topology, source lab.Pair) {
	b.t.Helper()
	labtest.Eventually(b.t, 10*time.Second, func() error {
		_, samples := b.leaks()
		for _, world := range topo.WorldAddr.All() {
			found := false
			for _, s := range samples {
				found = found || s.Source == source.Of(world) && s.Destination == world && s.Packets > 0
			}
			if !found {
				sendAll(b.t, topo)
				return fmt.Errorf("no leak to %s in %+v", world, samples)
			}
		}
		return nil
	})
}

// sentinelBench is a node whose device the sentinel watches.
func sentinelBench(t *testing.T, without []Feature) (*lab.Topology, *bench, policy.Input) {
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{Without: without, Sentinel: true})
	in := nodePolicy(t, topo)
	b.apply(in)
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Fatal(err)
	}
	if n, samples := b.leaks(); n != 0 || len(samples) != 0 {
		t.Fatalf("%d leaks: %+v", n, samples)
	}
	return topo, b, in
}

// A program between ours and the sentinel that takes the translation back is seen,
// in whichever order the two were attached.
func TestSentinelSeesRewrite(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo, b, in := sentinelBench(t, without)
		b.foreign(hook, rewrites(t, topo.PodAddrs[0]), false)
		if hook == HookTCX && b.healthy() {
			t.Error("a program behind the sentinel is not noticed")
		}
		b.apply(in)
		if !b.healthy() {
			t.Errorf("not healthy:\n%s", chain(t, topo.Node, "eth0"))
		}
		b.awaitLeaks(topo, topo.PodAddrs[0])
		if got := b.attachments(); len(got) != 1 || !got[0].Sentinel || len(got[0].Ahead) != 0 {
			t.Errorf("attached %+v", got)
		}
	})
}

// With our egress program gone, or before a foreign one behind the sentinel, too.
func TestSentinelSeesDetached(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo, b, in := sentinelBench(t, without)
		index := in.Devices[0].Index
		err := topo.Node.Do(func() error {
			if hook == HookTCX {
				return detachLink(b.opt.Root, index, egress)
			}
			return delFilters(index, egress)
		})
		if err != nil {
			t.Fatal(err)
		}
		b.awaitLeaks(topo, topo.PodAddrs[0])
		b.apply(in)
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
	})
}

// A program ahead that ends the chain hides packets from ours and from the sentinel.
// It is named, and ours goes ahead again, a few times.
func TestAheadIsHealed(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo, b, in := sentinelBench(t, without)
		wire := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1, SnapLen: 64})
		leaked := wire.Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
		b.foreign(hook, endsChain(t), true)
		if got := b.attachments(); len(got) != 1 || len(got[0].Ahead) != 1 || !strings.Contains(got[0].Ahead[0], "foreign") {
			t.Errorf("attached %+v", got)
		}
		labtest.Eventually(t, 10*time.Second, func() error {
			sendAll(t, topo)
			if leaked.N() == 0 {
				return fmt.Errorf("no leak on the wire")
			}
			return nil
		})
		if n, _ := b.leaks(); n != 0 {
			t.Errorf("the sentinel saw %d packets behind the end of the chain", n)
		}
		if b.healthy() {
			t.Error("not noticed")
		}
		b.apply(in)
		if got := b.attachments(); len(got) != 1 || len(got[0].Ahead) != 0 || !b.healthy() {
			t.Errorf("attached %+v\n%s", got, chain(t, topo.Node, "eth0"))
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
		if n := strings.Count(chain(t, topo.Node, "eth0"), "egress t"); n != 3 { // ours, foreign, sentinel
			t.Errorf("%d programs:\n%s", n, chain(t, topo.Node, "eth0"))
		}
		// The next agent finds all of it.
		b.close()
		b.open()
		b.apply(in)
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
	})
}

// Who else wants to be first has the last word after some rounds.
func TestAheadIsGivenUp(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy(t, topo)
	b.apply(in)
	for n := range maxMoves + 1 {
		b.foreign(HookTCX, foreignProgram(t), true)
		b.apply(in)
		if got := b.attachments(); len(got) != 1 || (len(got[0].Ahead) == 0) != (n < maxMoves) || !b.healthy() {
			t.Errorf("round %d: attached %+v", n, got)
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
	}
}

// The sentinel goes on without the agent, follows a change of the hook without a
// false alarm, and goes when it is not wanted any more.
func TestSentinelLife(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	topo, b, in := sentinelBench(t, nil)
	b.foreign(HookTCX, rewrites(t, topo.PodAddrs[0]), false)
	b.apply(in)
	b.close()
	b.awaitLeaks(topo, topo.PodAddrs[0])
	before, _ := b.leaks()
	b.open() // takes over, and forgets nothing
	b.apply(in)
	if n, _ := b.leaks(); n < before {
		t.Errorf("%d leaks, before %d", n, before)
	}
	b.close()
	remove(t, topo.Node, b.opt.Root)
	if got := chain(t, topo.Node, "eth0"); strings.Contains(got, "sentinel") || strings.Contains(got, "egress_ether") {
		t.Errorf("after remove:\n%s", got)
	}

	topo, b, in = sentinelBench(t, nil)
	for _, without := range [][]Feature{AllFeatures(), nil, AllFeatures()} {
		stop, done := make(chan struct{}), make(chan error, 1)
		server, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(topo.WorldAddr.V4, 0))
		if err != nil {
			t.Fatal(err)
		}
		_, conn, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, server.Addr)
		if err != nil {
			t.Fatal(err)
		}
		go func() { done <- echoUntil(conn, stop) }()
		b.close()
		b.opt.Without = without
		b.open()
		b.apply(in)
		close(stop)
		if err := <-done; err != nil {
			t.Error(err)
		}
		conn.Close()
		server.Close()
		if got := b.attachments(); len(got) != 1 || !got[0].Sentinel || !b.healthy() {
			t.Errorf("attached %+v", got)
		}
		if n, samples := b.leaks(); n != 0 {
			t.Errorf("%d leaks: %+v", n, samples)
		}
		if n := strings.Count(chain(t, topo.Node, "eth0"), "sentinel"); n != 1 {
			t.Errorf("%d sentinels:\n%s", n, chain(t, topo.Node, "eth0"))
		}
	}
	// A device that drains leaks nothing.
	devices := in.Devices
	in.Devices = nil
	b.apply(in)
	sendAll(t, topo)
	if n, samples := b.leaks(); n != 0 {
		t.Errorf("draining: %d leaks: %+v", n, samples)
	}
	in.Devices = devices
	b.apply(in)
	b.close()
	b.opt.Sentinel = false
	for _, without := range [][]Feature{AllFeatures(), nil} {
		b.opt.Without = without
		b.open()
		b.apply(in)
		if got := chain(t, topo.Node, "eth0"); strings.Contains(got, "sentinel") {
			t.Errorf("off:\n%s", got)
		}
		b.close()
	}
}
