package policy_test

import (
	"encoding/json"
	"flag"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// The twin answers by the text of the contract, section 2: it goes down the lines
// and down each list. It shares no code with Build and Decide.

// twinMatch returns the longest of prefixes that contains a.
func twinMatch(a netip.Addr, prefixes []netip.Prefix) (netip.Prefix, bool) {
	var best netip.Prefix
	found := false
	for _, q := range prefixes {
		if q.Contains(a) && (!found || q.Bits() > best.Bits()) {
			best, found = q, true
		}
	}
	return best, found
}

func prefixes(rules []policy.Rule) []netip.Prefix {
	var out []netip.Prefix
	for _, r := range rules {
		out = append(out, r.Prefix)
	}
	return out
}

// twinSource is lines 2 and 3.
func twinSource(in policy.Input, src netip.Addr) policy.Outcome {
	if slices.Contains(in.HostAddrs, src) {
		return policy.PassHost
	}
	if _, ok := twinMatch(src, prefixes(in.Sources)); !ok {
		return policy.PassSource
	}
	return policy.Continue
}

// twinDestination is lines 4 to 8, without IPv6 control traffic.
func twinDestination(in policy.Input, dst netip.Addr) (policy.Outcome, netip.Prefix) {
	host := netip.PrefixFrom(dst, dst.BitLen())
	if dst == netip.MustParseAddr("255.255.255.255") {
		return policy.PassMulticast, host
	}
	for _, d := range in.Devices {
		if slices.Contains(d.Broadcasts, dst) {
			return policy.PassMulticast, host
		}
	}
	if dst.IsMulticast() {
		if dst.Is4() {
			return policy.PassMulticast, netip.MustParsePrefix("224.0.0.0/4")
		}
		return policy.PassMulticast, netip.MustParsePrefix("ff00::/8")
	}
	if q, ok := twinMatch(dst, prefixes(in.Native)); ok {
		return policy.PassNative, q
	}
	if q, ok := twinMatch(dst, prefixes(in.NonMasq)); ok {
		return policy.PassNonMasq, q
	}
	if q, ok := twinMatch(dst, prefixes(in.Pods)); ok {
		return policy.PassPod, q
	}
	internal, external := false, false
	for _, n := range in.Nodes {
		if n.Addr == dst {
			internal = internal || n.Type != policy.ExternalIP
			external = external || n.Type == policy.ExternalIP
		}
	}
	switch in.RemoteNodes {
	case policy.RemoteAll:
		return policy.Continue, netip.Prefix{}
	case policy.RemoteExternal:
		external = false
	}
	if internal || external {
		return policy.PassNode, host
	}
	return policy.Continue, netip.Prefix{}
}

// control tells whether pkt is ND or MLD to a link-local address (RFC 4861, 2710, 3810).
func control(pkt policy.Packet) bool {
	types := []uint8{130, 131, 132, 133, 134, 135, 136, 137, 143}
	return !pkt.Src.Is4() && pkt.Proto == 58 && pkt.Dst.IsLinkLocalUnicast() && slices.Contains(types, pkt.ICMPType)
}

// kind sorts first packets: "open" can only open a connection, "stray" never can,
// "closed" is ICMP that is neither, "unknown" has no ports, "any" is the rest.
func kind(pkt policy.Packet) string {
	v4 := pkt.Src.Is4()
	switch {
	case pkt.Proto == 6:
		syn, ack := pkt.TCPFlags&2 != 0, pkt.TCPFlags&16 != 0
		fin, rst := pkt.TCPFlags&1 != 0, pkt.TCPFlags&4 != 0
		switch {
		case fin || rst || syn && ack:
			return "stray"
		case syn:
			return "open"
		}
		return "any"
	case pkt.Proto == 17, pkt.Proto == 132, pkt.Proto == 136:
		return "any"
	case v4 && pkt.Proto == 1:
		switch pkt.ICMPType {
		case 8, 13:
			return "open"
		case 0, 3, 4, 5, 11, 12, 14:
			return "stray"
		}
		return "closed"
	case !v4 && pkt.Proto == 58:
		switch {
		case pkt.ICMPType == 128:
			return "open"
		case pkt.ICMPType <= 127, pkt.ICMPType == 129:
			return "stray"
		}
		return "closed"
	}
	return "unknown"
}

func twin(in policy.Input, pkt policy.Packet) policy.Decision {
	if pkt.Src.Is4In6() || pkt.Dst.Is4In6() {
		return policy.Decision{Outcome: policy.DropBadHeader}
	}
	if pkt.Src.Is4() && !in.IPv4 || !pkt.Src.Is4() && !in.IPv6 {
		return policy.Decision{Outcome: policy.PassDisabled}
	}
	switch twinSource(in, pkt.Src) {
	case policy.PassHost:
		return policy.Decision{Outcome: policy.PassHost, Match: netip.PrefixFrom(pkt.Src, pkt.Src.BitLen())}
	case policy.PassSource:
		return policy.Decision{Outcome: policy.PassSource}
	}
	if control(pkt) {
		return policy.Decision{Outcome: policy.PassMulticast, Match: netip.MustParsePrefix("fe80::/10")}
	}
	if o, q := twinDestination(in, pkt.Dst); o != policy.Continue {
		return policy.Decision{Outcome: o, Match: q}
	}
	if pkt.Inbound && kind(pkt) != "open" {
		return policy.Decision{Outcome: policy.PassInbound}
	}
	at := slices.IndexFunc(in.Devices, func(d policy.Device) bool { return d.Index == pkt.Device })
	if at < 0 {
		return policy.Decision{Outcome: policy.PassDevice}
	}
	switch kind(pkt) {
	case "stray":
		return policy.Decision{Outcome: policy.DropStray}
	case "closed":
		return policy.Decision{Outcome: policy.DropProtocol}
	case "unknown":
		switch in.UnknownProtocols {
		case policy.UnknownDrop:
			return policy.Decision{Outcome: policy.DropProtocol}
		case policy.UnknownPass:
			return policy.Decision{Outcome: policy.PassProtocol}
		}
	}
	var route policy.RouteSource
	found := false
	for _, r := range in.RouteSources {
		if r.Prefix.Contains(pkt.Dst) && (!found || r.Prefix.Bits() > route.Prefix.Bits()) {
			route, found = r, true
		}
	}
	addr := route.Source
	if !addr.IsValid() && pkt.Src.Is4() {
		addr = in.Devices[at].IPv4
	} else if !addr.IsValid() {
		addr = in.Devices[at].IPv6
	}
	if !addr.IsValid() {
		return policy.Decision{Outcome: policy.DropNoAddress}
	}
	return policy.Decision{Outcome: policy.MasqNew, Address: addr}
}

// checkTables checks what the maps of the data plane rely on: the tables are
// sorted, unique and canonical, and a longest-prefix look-up in them answers
// like the lines of the contract.
func checkTables(t *testing.T, in policy.Input, p *policy.Policy, addrs []netip.Addr) {
	t.Helper()
	var src, dst, routes []netip.Prefix
	for _, s := range p.Sources() {
		src = append(src, s.Prefix)
	}
	for _, d := range p.Destinations() {
		dst = append(dst, d.Prefix)
	}
	for _, r := range p.RouteSources() {
		routes = append(routes, r.Prefix)
	}
	for name, table := range map[string][]netip.Prefix{"sources": src, "destinations": dst, "routes": routes} {
		for i, q := range table {
			if q != q.Masked() || q.Addr().Is4In6() {
				t.Errorf("%s: %s is not canonical", name, q)
			}
			if i > 0 && policy.ComparePrefixes(table[i-1], q) >= 0 {
				t.Errorf("%s: %s comes before %s", name, table[i-1], q)
			}
		}
	}
	for _, a := range addrs {
		got := policy.PassSource
		if q, ok := twinMatch(a, src); ok {
			got = p.Sources()[slices.Index(src, q)].Outcome
		}
		if want := twinSource(in, a); got != want {
			t.Errorf("source %s: the table says %s, the contract %s", a, got, want)
		}
		got = policy.Continue
		if q, ok := twinMatch(a, dst); ok {
			got = p.Destinations()[slices.Index(dst, q)].Outcome
		}
		if want, _ := twinDestination(in, a); got != want {
			t.Errorf("destination %s: the table says %s, the contract %s", a, got, want)
		}
	}
	for i, d := range p.Destinations() {
		if want := listed(in, d.Prefix); d.Listed != want {
			t.Errorf("destination %s: listed %b, want %b", dst[i], d.Listed, want)
		}
	}
}

func listed(in policy.Input, q netip.Prefix) policy.Listed {
	var l policy.Listed
	for flag, rules := range map[policy.Listed][]policy.Rule{
		policy.ListedNative: in.Native, policy.ListedNonMasq: in.NonMasq, policy.ListedPod: in.Pods,
	} {
		if slices.Contains(prefixes(rules), q) {
			l |= flag
		}
	}
	for _, n := range in.Nodes {
		if q.IsSingleIP() && q.Addr() == n.Addr {
			l |= policy.ListedNode
		}
	}
	return l
}

// checkRandom compares one random input and some random packets with the twin.
func checkRandom(t *testing.T, r *rand.Rand, packets int) {
	t.Helper()
	in := policytest.RandomInput(r)
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	var addrs []netip.Addr
	for range packets {
		pkt := policytest.RandomCase(r).Packet
		addrs = append(addrs, pkt.Src, pkt.Dst)
		got, want := p.Decide(pkt), twin(in, pkt)
		got.Origin = ""
		if got != want {
			t.Errorf("packet %+v:\n got %+v\nwant %+v", pkt, got, want)
		}
	}
	checkTables(t, in, p, addrs)
	if t.Failed() {
		text, _ := json.MarshalIndent(in, "", "  ")
		t.Fatalf("input: %s", text)
	}
}

var seed = flag.Uint64("seed", 0, "seed of the random inputs; 0 takes one from the clock")

func TestDecideAgainstTwin(t *testing.T) {
	first := *seed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("replay with -seed=%d", first)
	r := rand.New(rand.NewPCG(first, 0))
	for range 2000 {
		checkRandom(t, r, 30)
	}
}

// tape is a random source that plays the bytes of a fuzzer, then goes on at random.
type tape struct {
	data []byte
	rest *rand.PCG
}

func (s *tape) Uint64() uint64 {
	if len(s.data) == 0 {
		return s.rest.Uint64()
	}
	b := s.data[0]
	s.data = s.data[1:]
	return uint64(b) * 0x0101010101010101
}

func FuzzDecide(f *testing.F) {
	f.Add([]byte(nil), uint64(1))
	f.Add([]byte("a policy and its packets, drawn from these bytes"), uint64(2))
	f.Fuzz(func(t *testing.T, data []byte, rest uint64) {
		checkRandom(t, rand.New(&tape{data, rand.NewPCG(rest, 0)}), 20)
	})
}
