package policytest

import (
	"math/rand/v2"
	"net/netip"

	"bauta.dev/bauta/internal/policy"
)

// Random inputs and packets draw addresses and prefixes from so small a universe
// that entries overlap, nest and repeat, and packets meet them often.

var (
	randomBits4 = []int{0, 1, 4, 8, 24, 28, 29, 30, 31, 32, 32}
	randomBits6 = []int{0, 1, 7, 10, 64, 124, 125, 126, 127, 128, 128}
	special4    = []string{"224.0.0.1", "255.255.255.255", "0.0.0.0", "1.1.1.1", "138.0.0.1"}
	special6    = []string{"ff02::1", "fe80::1", "febf::1", "::", "2606:4700::1", "::ffff:10.0.0.1"}
)

// RandomInput returns an input that Build accepts.
func RandomInput(r *rand.Rand) policy.Input {
	in := policy.Input{
		IPv4: r.IntN(8) > 0, IPv6: r.IntN(8) > 0,
		Sources:          randomRules(r, 4, "sources"),
		Native:           randomRules(r, 4, "native"),
		NonMasq:          randomRules(r, 5, "nonmasq"),
		Pods:             randomRules(r, 4, "pods"),
		RemoteNodes:      []policy.RemoteNodes{"", policy.RemoteNone, policy.RemoteExternal, policy.RemoteAll}[r.IntN(4)],
		UnknownProtocols: []policy.UnknownProtocols{"", policy.UnknownMasquerade, policy.UnknownDrop, policy.UnknownPass}[r.IntN(4)],
	}
	for port := range 64 {
		in.Ports = append(in.Ports, 40000+uint16(port))
	}
	for range r.IntN(3) {
		if a := randomAddr(r, r.IntN(2) == 0); !a.Is4In6() {
			in.HostAddrs = append(in.HostAddrs, a)
		}
	}
	for range r.IntN(5) {
		if a := randomAddr(r, r.IntN(2) == 0); !a.Is4In6() {
			kind := []policy.NodeType{policy.InternalIP, policy.ExternalIP, policy.ExternalIP, policy.Hostname}[r.IntN(4)]
			in.Nodes = append(in.Nodes, policy.NodeAddr{Addr: a, Node: "other", Type: kind, Origin: "node other"})
		}
	}
	for _, name := range []string{"eth0", "eth1"} {
		if r.IntN(6) > 0 {
			in.Devices = append(in.Devices, randomDevice(r, name))
		}
	}
	for range r.IntN(5) {
		q := randomPrefix(r)
		in.RouteSources = append(in.RouteSources, policy.RouteSource{Prefix: q, Source: randomSource(r, q.Addr().Is4())})
	}
	return in
}

// RandomCase returns a packet of the same universe; Want is not set.
func RandomCase(r *rand.Rand) Case {
	is4 := r.IntN(2) == 0
	c := Case{Device: []string{"eth0", "eth0", "eth1"}[r.IntN(3)]}
	c.Packet = policy.Packet{Src: randomAddr(r, is4), Dst: randomAddr(r, is4), Inbound: r.IntN(5) == 0}
	c.Packet.Device = deviceIndex[c.Device]
	icmp := uint8(policy.ProtoICMPv6)
	if is4 {
		icmp = policy.ProtoICMP
	}
	switch c.Packet.Proto = []uint8{6, 6, 6, 17, 17, 132, 136, icmp, icmp, 47, 50, 1, 58, 4, 41}[r.IntN(15)]; c.Packet.Proto {
	case policy.ProtoTCP:
		c.Packet.TCPFlags = []uint8{policy.TCPSyn, policy.TCPAck, uint8(r.IntN(64))}[r.IntN(3)]
		fallthrough
	case policy.ProtoUDP, policy.ProtoSCTP, policy.ProtoUDPLite:
		c.SrcPort, c.DstPort = 1+uint16(r.IntN(65535)), 1+uint16(r.IntN(65535))
	case icmp:
		c.Packet.ICMPType = []uint8{8, 0, 3, 13, 14, 128, 129, 130, 135, 137, 143, uint8(r.IntN(256))}[r.IntN(12)]
		c.SrcPort = uint16(r.IntN(65536))
	}
	return c
}

func randomDevice(r *rand.Rand, name string) policy.Device {
	d := policy.Device{Name: name, Index: deviceIndex[name], Ethernet: true, IPv4: randomSource(r, true), IPv6: randomSource(r, false)}
	if a := randomAddr(r, true); r.IntN(2) == 0 {
		d.Broadcasts = append(d.Broadcasts, a)
	}
	return d
}

// randomSource returns no address in a quarter of cases.
func randomSource(r *rand.Rand, is4 bool) netip.Addr {
	n := byte(r.IntN(4))
	switch {
	case n == 0:
		return netip.Addr{}
	case is4:
		return netip.AddrFrom4([4]byte{192, 0, 2, n})
	}
	return netip.AddrFrom16([16]byte{0: 0x20, 1: 0x01, 2: 0x0d, 3: 0xb8, 15: n})
}

func randomRules(r *rand.Rand, most int, origin string) []policy.Rule {
	var rules []policy.Rule
	for range r.IntN(most + 1) {
		rules = append(rules, policy.Rule{Prefix: randomPrefix(r), Origin: origin})
	}
	return rules
}

func randomPrefix(r *rand.Rand) netip.Prefix {
	for {
		a := randomAddr(r, r.IntN(2) == 0)
		bits := randomBits6[r.IntN(len(randomBits6))]
		if a.Is4() {
			bits = randomBits4[r.IntN(len(randomBits4))]
		}
		if q := netip.PrefixFrom(a, bits).Masked(); !q.Addr().Is4In6() {
			return q
		}
	}
}

// randomAddr mostly returns one of the 16 addresses of 10.0.0.0/28 or fd00::/124.
func randomAddr(r *rand.Rand, is4 bool) netip.Addr {
	n, special := byte(r.IntN(16)), r.IntN(5) == 0
	switch {
	case is4 && special:
		return netip.MustParseAddr(special4[r.IntN(len(special4))])
	case is4:
		return netip.AddrFrom4([4]byte{10, 0, 0, n})
	case special:
		return netip.MustParseAddr(special6[r.IntN(len(special6))])
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 15: n})
}
