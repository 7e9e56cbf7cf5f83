package datapath

import (
	"net/netip"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// routeTo is a route of the loopback device to 198.51.i.0/24 with the source 192.0.2.(i+2).
func routeTo(i int) policy.RouteSource {
	return policy.RouteSource{
		Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i), 0}), 24),
		Source: netip.AddrFrom4([4]byte{192, 0, 2 + byte((i+2)>>8), byte(i + 2)}),
	}
}

// Routes say which source a flow gets, up to the limit of different ones; one more
// is refused, and what was in force stays so. A sweep knows their addresses.
func TestApplyRouteSources(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	in := loopPolicy(ports(40000, 1000))
	const limit = 255
	for i := range limit {
		in.RouteSources = append(in.RouteSources, routeTo(i))
	}
	in.RouteSources = append(in.RouteSources,
		policy.RouteSource{Prefix: netip.MustParsePrefix("198.18.0.0/15"), Source: routeTo(7).Source}) // no other source
	b.apply(in)
	progs := b.programs()
	leavesAs := func(i int, dst, want netip.Addr) {
		t.Helper()
		p := tcpFlow(i)
		p.Dst, p.Proto = dst, packet.UDP
		var src netip.Addr
		err := b.ns.Do(func() error {
			out, ok, err := progs.send(p)
			if ok {
				src, _ = netip.AddrFromSlice(out[26:30])
			}
			return err
		})
		if err != nil || src != want {
			t.Errorf("to %s: left as %s, not as %s, %v", dst, src, want, err)
		}
	}
	all := func() {
		t.Helper()
		for i := range limit {
			leavesAs(i, routeTo(i).Prefix.Addr().Next(), routeTo(i).Source)
		}
		leavesAs(300, netip.MustParseAddr("198.19.0.1"), routeTo(7).Source)
		leavesAs(301, netip.MustParseAddr("203.0.113.9"), in.Devices[0].IPv4)
	}
	all()
	if s := b.sweep(); s.Vanished != 0 || s.Usage[0].Flows != limit+2 {
		t.Errorf("%+v", s)
	}
	more := in
	more.RouteSources = append(more.RouteSources[:len(in.RouteSources):len(in.RouteSources)], routeTo(limit))
	if err := b.tryApply(more); err == nil || !strings.Contains(err.Error(), "256 different source addresses, the limit is 255") {
		t.Errorf("one more: %v", err)
	}
	b.forgetFlows()
	all()
	// Fewer routes: the mappings of their sources end, others stay.
	in.RouteSources = in.RouteSources[:8]
	b.apply(in)
	if s := b.sweep(); s.Vanished != limit-8 || s.Usage[0].Flows != 10 {
		t.Errorf("fewer routes: %+v", s)
	}
	leavesAs(400, routeTo(100).Prefix.Addr().Next(), in.Devices[0].IPv4)
	b.checkRouteTable(8)
}

// checkRouteTable counts the rows of the table of routes in force.
func (b *bench) checkRouteTable(want int) {
	b.t.Helper()
	var key masqPrefix
	var rule masqRule
	n := 0
	it := b.applied.tries[trieRoute].Iterate()
	for it.Next(&key, &rule) {
		if rule.Source != 0 {
			n++
		}
	}
	if err := it.Err(); err != nil || n != want {
		b.t.Errorf("%d rows of routes, want %d, %v", n, want, err)
	}
}

// The third table is written with the others or not at all.
func TestApplyRouteSourcesUnchanged(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	in := loopPolicy(ports(40000, 10))
	in.RouteSources = []policy.RouteSource{routeTo(1)}
	b.apply(in)
	before := b.applied.tries
	in.NonMasq = prefixes(16, 2)
	b.apply(in)
	if after := b.applied.tries; after[trieRoute] != before[trieRoute] || after[trieDestination] == before[trieDestination] {
		t.Error("another table was written than the one that changed")
	}
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	s, err := renderSetting(p)
	if err != nil || s.Routes != 1 || s.Source[1] != addrTo(routeTo(1).Source) {
		t.Errorf("settings: %d routes, %v", s.Routes, err)
	}
}
