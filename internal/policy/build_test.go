package policy_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/policy"
)

func rules(texts ...string) []policy.Rule {
	var out []policy.Rule
	for _, s := range texts {
		out = append(out, policy.Rule{Prefix: netip.MustParsePrefix(s), Origin: "test"})
	}
	return out
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// valid is an input with something in every field.
func valid() policy.Input {
	return policy.Input{
		IPv4: true, IPv6: true,
		Sources:   rules("10.0.0.0/16"),
		HostAddrs: []netip.Addr{addr("192.0.2.1"), addr("fe80::1%eth0")},
		Native:    rules("10.0.0.0/8"),
		NonMasq:   rules("172.16.0.0/12"),
		Pods:      rules("10.0.2.0/24"),
		Nodes:     []policy.NodeAddr{{Addr: addr("192.0.2.7"), Node: "b"}},
		Devices: []policy.Device{{Name: "eth0", Index: 2, IPv4: addr("192.0.2.1"), IPv6: addr("2001:db8::1"),
			Broadcasts: []netip.Addr{addr("192.0.2.255")}}},
		RouteSources: []policy.RouteSource{{Prefix: netip.MustParsePrefix("1.0.0.0/8"), Source: addr("192.0.2.1")}},
		Ports:        []uint16{40000, 40001},
	}
}

func TestBuildRefuses(t *testing.T) {
	second := func(d policy.Device) func(*policy.Input) {
		return func(in *policy.Input) { in.Devices = append(in.Devices, d) }
	}
	route := func(q netip.Prefix, a netip.Addr) func(*policy.Input) {
		return func(in *policy.Input) { in.RouteSources = []policy.RouteSource{{Prefix: q, Source: a}} }
	}
	q4 := netip.MustParsePrefix("10.0.0.0/8")
	for _, tc := range []struct {
		want  string // part of the error
		spoil func(*policy.Input)
	}{
		{"source range 10.0.0.1/8 (test)", func(in *policy.Input) { in.Sources = rules("10.0.0.1/8") }},
		{"native-routing CIDR invalid Prefix", func(in *policy.Input) { in.Native = make([]policy.Rule, 1) }},
		{"non-masquerade CIDR fd00::1/64", func(in *policy.Input) { in.NonMasq = rules("fd00::1/64") }},
		{"pod range ::ffff:10.0.0.0/120", func(in *policy.Input) {
			in.Pods = []policy.Rule{{Prefix: netip.PrefixFrom(addr("::ffff:10.0.0.0"), 120)}}
		}},
		{"node's own address invalid IP", func(in *policy.Input) { in.HostAddrs = make([]netip.Addr, 1) }},
		{"node's own address ::ffff:192.0.2.1", func(in *policy.Input) { in.HostAddrs = []netip.Addr{addr("::ffff:192.0.2.1")} }},
		{"node c: address invalid IP", func(in *policy.Input) { in.Nodes = []policy.NodeAddr{{Node: "c"}} }},
		{"node c: address fe80::1%eth0", func(in *policy.Input) { in.Nodes = []policy.NodeAddr{{Node: "c", Addr: addr("fe80::1%eth0")}} }},
		{`remote-node-masquerade "some"`, func(in *policy.Input) { in.RemoteNodes = "some" }},
		{`unknown-protocols "allow"`, func(in *policy.Input) { in.UnknownProtocols = "allow" }},
		{"nat-timeout -1s", func(in *policy.Input) { in.Timeouts.UDP = -time.Second }},
		{"nat-timeout 1ms", func(in *policy.Input) { in.Timeouts.Other = time.Millisecond }},
		{"external ports: none is left", func(in *policy.Input) { in.Ports = nil }},
		{"external ports: 0:", func(in *policy.Input) { in.Ports = []uint16{0, 1} }},
		{"external ports: 5:", func(in *policy.Input) { in.Ports = []uint16{5, 5} }},
		{"external ports: 4:", func(in *policy.Input) { in.Ports = []uint16{5, 4} }},
		{"device eth1: index 0", second(policy.Device{Name: "eth1"})},
		{"device eth1: index 2: device eth0 has it too", second(policy.Device{Name: "eth1", Index: 2})},
		{"device eth1: masquerade address 2001:db8::1: not an IPv4", second(policy.Device{Name: "eth1", Index: 3, IPv4: addr("2001:db8::1")})},
		{"device eth1: masquerade address 192.0.2.1: not an IPv6", second(policy.Device{Name: "eth1", Index: 3, IPv6: addr("192.0.2.1")})},
		{"device eth1: masquerade address ::ffff:192.0.2.1", second(policy.Device{Name: "eth1", Index: 3, IPv6: addr("::ffff:192.0.2.1")})},
		{"device eth1: masquerade address fe80::1%eth1", second(policy.Device{Name: "eth1", Index: 3, IPv6: addr("fe80::1%eth1")})},
		{"device eth1: masquerade address 0.0.0.0", second(policy.Device{Name: "eth1", Index: 3, IPv4: addr("0.0.0.0")})},
		{"device eth1: masquerade address ff02::1", second(policy.Device{Name: "eth1", Index: 3, IPv6: addr("ff02::1")})},
		{"device eth1: broadcast address ff02::1", second(policy.Device{Name: "eth1", Index: 3, Broadcasts: []netip.Addr{addr("ff02::1")}})},
		{"route invalid Prefix", route(netip.Prefix{}, addr("192.0.2.1"))},
		{"route 10.0.0.1/8", route(netip.MustParsePrefix("10.0.0.1/8"), addr("192.0.2.1"))},
		{"route 10.0.0.0/8: source 2001:db8::1", route(q4, addr("2001:db8::1"))},
		{"route 10.0.0.0/8: source 0.0.0.0", route(q4, addr("0.0.0.0"))},
	} {
		in := valid()
		tc.spoil(&in)
		if _, err := policy.Build(in); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got error %v, want %q", err, tc.want)
		}
	}
	if _, err := policy.Build(valid()); err != nil {
		t.Errorf("valid input: %v", err)
	}
	if _, err := policy.Build(policy.Input{}); err != nil {
		t.Errorf("zero input: %v", err)
	}
}

func TestBuildReportsTheFirstErrorAlways(t *testing.T) {
	in := valid()
	in.Sources, in.Native, in.NonMasq, in.Pods = rules("10.0.0.1/8"), rules("10.0.0.2/8"), rules("10.0.0.3/8"), rules("10.0.0.4/8")
	for range 50 {
		if _, err := policy.Build(in); err == nil || !strings.Contains(err.Error(), "source range") {
			t.Fatalf("got error %v, want that of the source range", err)
		}
	}
}

func TestBuildLimitsTheList(t *testing.T) {
	in := valid()
	in.NonMasq = rules("169.254.0.0/16", "fe80::/10")
	for i := range policy.MaxPrefixes {
		in.NonMasq = append(in.NonMasq,
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), 0}), 24)},
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 4: byte(i >> 8), 5: byte(i)}), 48)})
	}
	p, err := policy.Build(in)
	if err != nil {
		t.Fatalf("a full list in both families, with the link-local prefixes: %v", err)
	}
	if n := len(p.Destinations()); n < 2*policy.MaxPrefixes {
		t.Errorf("%d destinations, want %d or more", n, 2*policy.MaxPrefixes)
	}
	in.NonMasq = append(in.NonMasq, rules("12.0.0.0/24")...)
	if _, err := policy.Build(in); err == nil || !strings.Contains(err.Error(), "65537 prefixes") {
		t.Errorf("one more: got error %v", err)
	}
}

func TestBuildDefaults(t *testing.T) {
	p, err := policy.Build(policy.Input{Timeouts: policy.Timeouts{UDP: time.Minute}})
	if err != nil {
		t.Fatal(err)
	}
	want := policy.DefaultTimeouts
	want.UDP = time.Minute
	if got := p.Input(); got.Timeouts != want || got.RemoteNodes != policy.RemoteNone || got.UnknownProtocols != policy.UnknownMasquerade {
		t.Errorf("got %+v", got)
	}
}

// The tables go into maps and into a file that users read: they depend on what
// is listed, not on the order.
func TestTablesIgnoreTheOrderOfLists(t *testing.T) {
	in := valid()
	in.Native = append(in.Native, rules("10.1.0.0/16", "fd00::/8", "10.0.2.0/24")...)
	in.Nodes = append(in.Nodes, policy.NodeAddr{Addr: addr("2001:db8::7"), Node: "c", Type: policy.ExternalIP})
	in.Sources = append(in.Sources, rules("192.0.2.1/32", "fd00::/8")...)
	a, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	slices.Reverse(in.Native)
	slices.Reverse(in.Nodes)
	slices.Reverse(in.Sources)
	b, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a.Sources(), b.Sources()) || !reflect.DeepEqual(a.Destinations(), b.Destinations()) {
		t.Errorf("tables differ:\n%v %v\n%v %v", a.Sources(), a.Destinations(), b.Sources(), b.Destinations())
	}
}

func TestDecideIgnoresZones(t *testing.T) {
	in := valid()
	in.Sources = rules("fe80::/10")
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	pkt := policy.Packet{Src: addr("fe80::1%eth9"), Dst: addr("fe80::2%eth9"), Proto: policy.ProtoICMPv6, ICMPType: 135, Device: 2}
	if got := p.Decide(pkt).Outcome; got != policy.PassHost {
		t.Errorf("from the node: got %s", got)
	}
	pkt.Src = addr("fe80::3%eth9")
	if got := p.Decide(pkt).Outcome; got != policy.PassMulticast {
		t.Errorf("neighbor discovery: got %s", got)
	}
}

// Origins are what explain and policy.json show.
func TestDecideNamesTheOrigin(t *testing.T) {
	in := valid()
	in.NonMasq = []policy.Rule{
		{Prefix: netip.MustParsePrefix("172.16.0.0/12"), Origin: "file a"},
		{Prefix: netip.MustParsePrefix("172.16.0.0/12"), Origin: "file b"},
	}
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	for dst, want := range map[string]string{"172.16.0.1": "file a", "10.0.9.9": "test", "192.0.2.255": "device eth0", "224.0.0.1": "default"} {
		got := p.Decide(policy.Packet{Src: addr("10.0.0.2"), Dst: addr(dst), Proto: policy.ProtoUDP, Device: 2})
		if got.Origin != want {
			t.Errorf("%s: origin %q, want %q", dst, got.Origin, want)
		}
	}
}

func ExamplePolicy_Decide() {
	p, err := policy.Build(valid())
	if err != nil {
		fmt.Println(err)
		return
	}
	d := p.Decide(policy.Packet{Src: addr("10.0.1.2"), Dst: addr("172.16.0.9"), Proto: policy.ProtoTCP, TCPFlags: policy.TCPSyn, Device: 2})
	fmt.Println(d.Outcome, d.Match, "from", d.Origin)
	d = p.Decide(policy.Packet{Src: addr("10.0.1.2"), Dst: addr("1.1.1.1"), Proto: policy.ProtoTCP, TCPFlags: policy.TCPSyn, Device: 2})
	fmt.Println(d.Outcome, "as", d.Address)
	// Output:
	// pass-nonmasq 172.16.0.0/12 from test
	// masq-new as 192.0.2.1
}

// The defaults are what RFC 4787 REQ-5, RFC 5382 REQ-5, RFC 5508 REQ-2 and RFC 7857
// ask for at least.
func TestDefaultTimeouts(t *testing.T) {
	d := policy.DefaultTimeouts
	for _, c := range []struct {
		name       string
		got, least time.Duration
	}{
		{"TCP before it is established", d.TCPSyn, 4 * time.Minute},
		{"TCP established", d.TCPEstablished, 2*time.Hour + 4*time.Minute},
		{"TCP closing", d.TCPClosing, 4 * time.Minute},
		{"UDP", d.UDP, 2 * time.Minute},
		{"UDP answered", d.UDPStream, 5 * time.Minute},
		{"ICMP query", d.ICMP, time.Minute},
	} {
		if c.got < c.least {
			t.Errorf("%s: %v, want at least %v", c.name, c.got, c.least)
		}
	}
}
