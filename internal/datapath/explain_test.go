package datapath

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// explainer opens the data plane of a rig as the command does, with what the live programs use of the kernel.
type explainer struct {
	*rig
	in *Inspector
	*Explainer
}

func (r *rig) explain() *explainer {
	r.t.Helper()
	in, err := Inspect(r.d.opt.Root)
	r.must(err)
	e, err := in.Explain(r.d.opt.Without...)
	r.must(err)
	r.t.Cleanup(func() { e.Close(); in.Close() })
	return &explainer{r, in, e}
}

// about asks for the packet p on a device.
func (e *explainer) about(p packet.Packet, dev string) (a Answer) {
	e.t.Helper()
	local, remote := netip.AddrPortFrom(p.Src, 0), netip.AddrPortFrom(p.Dst, 0)
	switch {
	case p.HasPorts():
		local, remote = netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort)
	case p.IsQuery() && (p.Type == 0 || p.Type == 14 || p.Type == 129): // a reply has it where the query's sender is
		remote = netip.AddrPortFrom(p.Dst, p.Ident)
	case p.IsQuery():
		local = netip.AddrPortFrom(p.Src, p.Ident)
	case isICMPError(p): // its flow is that of what it quotes, which p answers
		q := caseQuoted(p)
		local, remote = netip.AddrPortFrom(q.Dst, q.DstPort), netip.AddrPortFrom(q.Src, q.SrcPort)
		p.Link = packet.Ethernet
	}
	proto := p.Proto
	if isICMPError(p) {
		proto = packet.UDP
	}
	e.must(e.ns.Do(func() (err error) {
		a, err = e.ask(p, flowKey{local, remote, proto}, e.device[dev])
		return err
	}))
	return a
}

// The table of cases has the outcomes of the programs.
func testExplainTable(t *testing.T, r *rig) {
	e := r.explain()
	groups, err := policytest.Load()
	r.must(err)
	cases := 0
	for _, g := range groups {
		g, err := g.WithDevices(r.device)
		r.must(err)
		r.apply(g.Input)
		for _, c := range g.Cases {
			r.clear()
			cases++
			p := casePacket(c)
			if c.Packet.Inbound {
				r.run(ingress, c.Device, p.Link, opener(p).Build())
			}
			a := e.about(p, c.Device)
			res := r.run(egress, c.Device, p.Link, p.Build())
			if a.Outcome != res.outcome {
				t.Errorf("%s: %s: explain says %s, the program %s", g.Name, c.Text, a.Outcome, res.outcome)
			}
			got := policy.Decision{Outcome: a.Outcome}
			if a.Outcome == policy.MasqNew {
				got.Address = a.Source.Addr()
				if want := sourceIn(res.data[p.Link.Size():], p); a.Source != want {
					t.Errorf("%s: %s: explain says %s, the packet got %s", g.Name, c.Text, a.Source, want)
				}
			}
			if err := c.Check(got); err != nil {
				t.Errorf("%s: %v", g.Name, err)
			}
		}
	}
	t.Logf("%d cases", cases)
}

// dump is the content of all live tables, as bytes.
func (r *rig) dump() map[string][]byte {
	r.t.Helper()
	out := make(map[string][]byte)
	for name, m := range r.d.objs.byName() {
		if name == pinPolicies { // the tables in it have pins of their own
			for set := range uint32(2) {
				for which := range tries {
					if inner, err := ebpf.LoadPinnedMap(r.d.opt.Root+"/"+pinTrie(set, which), nil); err == nil {
						out[pinTrie(set, which)] = r.dumpMap(inner)
						inner.Close()
					}
				}
			}
			continue
		}
		out[name] = r.dumpMap(m)
	}
	return out
}

func (r *rig) dumpMap(m *ebpf.Map) []byte {
	r.t.Helper()
	var entries [][]byte
	key, err := m.NextKeyBytes(nil)
	for ; key != nil && err == nil; key, err = m.NextKeyBytes(key) {
		var perCPU [][]byte
		entry := slices.Clone(key)
		if m.Type() == ebpf.PerCPUArray {
			r.must(m.Lookup(key, &perCPU))
			entry = append(entry, bytes.Join(perCPU, nil)...)
		} else {
			value, err := m.LookupBytes(key)
			r.must(err)
			entry = append(entry, value...)
		}
		entries = append(entries, entry)
	}
	r.must(err)
	slices.SortFunc(entries, bytes.Compare)
	return bytes.Join(entries, nil)
}

// Thousands of questions of all kinds leave every byte of every live table as it was.
func testExplainChangesNothing(t *testing.T, r *rig) {
	in := r.familyInput()
	in.MaxPortsPerPod = 20
	r.apply(in)
	random := rand.New(rand.NewPCG(1, 2))
	for _, f := range families { // known flows, some closed, and connections from outside
		for n := range uint16(12) {
			p := f.udp().From(f.pod, 40000+2*n)
			r.translate(p, policy.MasqNew, f.node)
			r.run(ingress, "eth0", packet.Ethernet, packet.Packet{Src: f.other, Dst: f.pod, Proto: packet.TCP, SrcPort: 1000 + n, DstPort: 80, Flags: packet.SYN}.Build())
		}
		for n := range uint16(25) { // more than one pod may have
			r.run(egress, "eth0", packet.Ethernet, f.tcp(packet.SYN).From(f.pod2, 50000+n).Build())
		}
	}
	e := r.explain()
	before := r.dump()
	outcomes := make(map[policy.Outcome]int)
	const questions = 4000
	for range questions {
		f := families[random.IntN(2)]
		srcs := []netip.Addr{f.pod, f.pod2, f.node, f.foreign, f.gateway}
		dsts := []netip.Addr{f.remote, f.other, f.excluded, f.node, f.pod2}
		q := Question{
			Src:    netip.AddrPortFrom(srcs[random.IntN(len(srcs))], uint16(40000+random.IntN(30))),
			Dst:    netip.AddrPortFrom(dsts[random.IntN(len(dsts))], uint16([]int{53, 80, 443}[random.IntN(3)])),
			Proto:  []uint8{packet.TCP, packet.UDP, f.icmp}[random.IntN(3)],
			Device: []int{r.device["eth0"], r.device["eth1"], loopback}[random.IntN(3)],
		}
		if q.Proto == f.icmp {
			q.Dst = netip.AddrPortFrom(q.Dst.Addr(), 0)
		}
		var a Answer
		r.must(r.ns.Do(func() (err error) {
			a, err = e.Ask(q)
			return err
		}))
		outcomes[a.Outcome]++
	}
	after := r.dump()
	for name := range before {
		if !bytes.Equal(before[name], after[name]) {
			t.Errorf("%s has changed", name)
		}
	}
	t.Logf("%d questions, %d tables: %v", questions, len(before), outcomes)
	for _, want := range []policy.Outcome{policy.MasqNew, policy.MasqKnown, policy.PassHost, policy.PassSource, policy.PassNative, policy.PassDevice} {
		if outcomes[want] == 0 {
			t.Errorf("no question ended in %s", want)
		}
	}
}

// The port is the one that the flow gets right after; a known flow is told with its own.
func testExplainPort(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	e := r.explain()
	eachFamily(t, r, func(r *rig, f family) {
		e := &explainer{r, e.in, e.Explainer}
		for _, k := range f.opening() {
			r.clear()
			for n := range uint16(20) {
				// Two pods that want the same ports.
				for _, pod := range []netip.Addr{f.pod, f.pod2} {
					p := k.p.From(pod, keptPort+n)
					told := e.about(p, "eth0")
					if told.Outcome != policy.MasqNew {
						t.Fatalf("%s: %s", k.name, told.Outcome)
					}
					if again := e.about(p, "eth0"); again != told {
						t.Errorf("%s: asked again: %v, was %v", k.name, again, told)
					}
					out := r.translate(p, policy.MasqNew, f.node)
					if got := netip.AddrPortFrom(f.node, out.Port()); k.p.Port() != 0 && got != told.Source {
						t.Errorf("%s: told %s, got %s", k.name, told.Source, got)
					}
					if known := e.about(p, "eth0"); known.Outcome != policy.MasqKnown || known.Source != told.Source {
						t.Errorf("%s: known: %v, want %s", k.name, known, told.Source)
					}
					if k.p.Port() == 0 {
						return // one inner host a remote
					}
				}
			}
		}
	})
}

// What makes a new flow impossible is told as the program says it, and nothing is used up by asking.
func testExplainRefusals(t *testing.T, r *rig) {
	eachFamily(t, r, func(r *rig, f family) {
		in := r.familyInput()
		r.apply(in)
		e := r.explain()
		ask := func(what string, p packet.Packet, want policy.Outcome) {
			t.Helper()
			for range 3 {
				if a := e.about(p, "eth0"); a.Outcome != want {
					t.Errorf("%s: %s, want %s", what, a.Outcome, want)
				}
			}
		}
		fill := func(n int) {
			t.Helper()
			for i := range n {
				r.translate(f.udp().From(f.pod, uint16(1000+i)), policy.MasqNew, f.node)
			}
		}
		fill(len(in.Ports))
		ask("no port is free", f.udp().From(f.pod2, keptPort), policy.DropNoPort)
		ask("towards another", f.udp().From(f.pod2, keptPort).To(f.other, 53), policy.MasqNew)

		in.MaxPortsPerPod = 3
		r.apply(in)
		fill(3)
		ask("quota", f.udp().From(f.pod, keptPort), policy.DropQuota)
		ask("another pod", f.udp().From(f.pod2, keptPort), policy.MasqNew)

		in.MaxPortsPerPod, in.NewFlowsPerPod = 0, 2
		r.apply(in)
		now, err := monotonic()
		r.must(err)
		r.must(r.d.objs.Pods.Put(addrTo(f.pod), masqPod{FlowsDue: uint64(now) + uint64(time.Hour)}))
		ask("rate", f.udp(), policy.DropRate)

		in.NewFlowsPerPod = 0
		in.Devices[0].IPv4, in.Devices[0].IPv6 = netip.Addr{}, netip.Addr{}
		r.apply(in)
		ask("no address", f.udp(), policy.DropNoAddress)
	})
}

// A full table is told, though none of its entries has to do with the packet.
func testExplainFull(t *testing.T, r *rig) {
	eachFamily(t, r, func(r *rig, f family) {
		in := r.familyInput()
		r.apply(in)
		known := f.udp()
		r.translate(known, policy.MasqNew, f.node)
		for n := 0; ; n++ {
			p := f.udp().To(f.other, uint16(1+n))
			if res := r.run(egress, "eth0", packet.Ethernet, p.Build()); res.outcome == policy.DropTableFull {
				break
			}
			if n > 2*rigFlows {
				t.Fatal("the table is never full")
			}
		}
		e := r.explain()
		before := r.dump()
		if a := e.about(f.udp().To(f.remote, 5353), "eth0"); a.Outcome != policy.DropTableFull {
			t.Errorf("new flow: %s", a.Outcome)
		}
		if a := e.about(known, "eth0"); a.Outcome != policy.MasqKnown {
			t.Errorf("known flow: %s", a.Outcome)
		}
		for name, b := range r.dump() {
			if !bytes.Equal(b, before[name]) {
				t.Errorf("%s has changed", name)
			}
		}
	})
}

// A connection opened from outside is told; a SYN of the pod's opens one of its own all the same.
func testExplainInbound(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		e := r.explain()
		for _, c := range []struct {
			p    packet.Packet
			want policy.Outcome
		}{{f.udp(), policy.PassInbound}, {f.tcp(packet.SYN), policy.MasqNew}} {
			if a := e.about(c.p, "eth0"); a.Outcome != policy.MasqNew || a.Inbound {
				t.Errorf("protocol %d, without: %+v", c.p.Proto, a)
			}
			open := c.p
			open.Src, open.Dst, open.SrcPort, open.DstPort = c.p.Dst, c.p.Src, c.p.DstPort, c.p.SrcPort
			r.expect(ingress, open, policy.PassInbound)
			if a := e.about(c.p, "eth0"); a.Outcome != c.want || !a.Inbound {
				t.Errorf("protocol %d: %+v, want %s", c.p.Proto, a, c.want)
			}
		}
	})
}

// The entry that decides is found in the kernel's own tables.
func testExplainMatch(t *testing.T, r *rig) {
	in := r.familyInput()
	for _, f := range families {
		in.NonMasq = append(in.NonMasq, policy.Rule{Prefix: netip.PrefixFrom(f.router, f.router.BitLen()), Origin: "test"})
	}
	r.apply(in)
	e := r.explain()
	for _, f := range families {
		for _, c := range []struct {
			outcome  policy.Outcome
			src, dst netip.Addr
			want     netip.Prefix
		}{
			{policy.PassNative, f.pod, f.excluded, f.natives},
			{policy.PassNonMasq, f.pod, f.router, netip.PrefixFrom(f.router, f.router.BitLen())},
			{policy.PassHost, f.gateway, f.remote, netip.PrefixFrom(f.gateway, f.gateway.BitLen())},
			{policy.MasqNew, f.pod, f.remote, f.pods},
			{policy.DropNoPort, f.pod, f.remote, f.pods},
			{policy.PassNonMasq, f.pod, f.remote, netip.Prefix{}},
			{policy.PassSource, f.foreign, f.remote, netip.Prefix{}},
		} {
			if got, err := e.in.Match(c.outcome, c.src, c.dst); err != nil || got != c.want {
				t.Errorf("%s from %s to %s: %v, %v, want %v", c.outcome, c.src, c.dst, got, err, c.want)
			}
		}
	}
}

// Tables of another layout can't be asked; those of the same layout can, whatever object made them.
func testExplainLayout(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	r.state(func(st *masqState) { st.Layout++ })
	t.Cleanup(func() { r.state(func(st *masqState) { st.Layout = mapLayout }) })
	in, err := Inspect(r.d.opt.Root)
	r.must(err)
	defer in.Close()
	if _, err := in.Explain(); err == nil || hints(err) == "" {
		t.Errorf("another layout: %v, want an error with a hint", err)
	}
}

// While questions are asked, flows are made and translated as if nobody asked.
func testExplainBesideTraffic(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	e := r.explain()
	f := families[0]
	ctx, stop := context.WithCancel(t.Context())
	asked := make(chan error, 1)
	go func() {
		for n := uint16(0); ; n++ {
			if ctx.Err() != nil {
				asked <- nil
				return
			}
			err := r.ns.Do(func() error {
				_, err := e.Ask(Question{Src: netip.AddrPortFrom(f.pod2, 40000+n%64), Dst: netip.AddrPortFrom(f.remote, 80), Proto: packet.TCP, Device: r.device["eth0"]})
				return err
			})
			if err != nil {
				asked <- fmt.Errorf("question %d: %w", n, err)
				return
			}
		}
	}()
	for n := range uint16(64) {
		p := f.tcp(packet.SYN).From(f.pod, 40000+n)
		if out := r.translate(p, policy.MasqNew, f.node); out.Port() != 40000+n {
			t.Errorf("port %d became %d", 40000+n, out.Port())
		}
		for range 50 {
			r.translate(p, policy.MasqKnown, f.node)
		}
	}
	stop()
	r.must(<-asked)
	if got := len(r.flows(forwardTable)); got != 64 {
		t.Errorf("%d flows, want 64", got)
	}
}
