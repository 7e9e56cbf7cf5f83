package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// family holds what differs between IPv4 and IPv6 for the tests of the programs,
// which are written once. A test run takes skb->protocol from where an Ethernet
// header has it: of a raw packet these bytes are in the source address, so all
// addresses that can be a source on a raw device have 08 00 or 86 dd there.
type family struct {
	name               string
	pods, natives      netip.Prefix
	pod, pod2          netip.Addr
	node, node2        netip.Addr // masquerade addresses of eth0 and eth1
	gateway            netip.Addr // another address of the node
	remote, other      netip.Addr // two outside hosts
	router             netip.Addr // on the way to them
	excluded           netip.Addr
	foreign            netip.Addr // in no source range
	icmp, echo, answer uint8
}

var families = []family{
	{
		name: "IPv4", pods: netip.MustParsePrefix("8.0.1.0/24"), natives: netip.MustParsePrefix("8.0.7.0/24"),
		pod: netip.MustParseAddr("8.0.1.2"), pod2: netip.MustParseAddr("8.0.1.3"),
		node: netip.MustParseAddr("192.0.2.1"), node2: netip.MustParseAddr("198.51.100.1"),
		gateway: netip.MustParseAddr("8.0.1.1"), remote: netip.MustParseAddr("8.0.99.1"), other: netip.MustParseAddr("8.0.99.2"),
		router: netip.MustParseAddr("8.0.88.1"), excluded: netip.MustParseAddr("8.0.7.7"), foreign: netip.MustParseAddr("8.0.66.6"),
		icmp: packet.ICMP, echo: 8, answer: 0,
	},
	{
		name: "IPv6", pods: netip.MustParsePrefix("fd00:1:86dd::/64"), natives: netip.MustParsePrefix("fd00:7:86dd::/64"),
		pod: netip.MustParseAddr("fd00:1:86dd::2"), pod2: netip.MustParseAddr("fd00:1:86dd::3"),
		node: netip.MustParseAddr("2001:db8:2::1"), node2: netip.MustParseAddr("2001:db8:51::1"),
		gateway: netip.MustParseAddr("fd00:1:86dd::1"), remote: netip.MustParseAddr("2600:1:86dd::1"), other: netip.MustParseAddr("2600:1:86dd::2"),
		router: netip.MustParseAddr("2600:8:86dd::1"), excluded: netip.MustParseAddr("fd00:7:86dd::7"), foreign: netip.MustParseAddr("fd00:66:86dd::6"),
		icmp: packet.ICMPv6, echo: 128, answer: 129,
	},
}

// The pool of the tests: a port in it is kept, another one is changed.
const (
	firstPort, lastPort = 40000, 40063
	keptPort            = 40007
	changedPort         = 3333
)

// familyInput is the policy of both families.
func (r *rig) familyInput() policy.Input {
	in := policy.Input{IPv4: true, IPv6: true}
	for port := uint16(firstPort); port <= lastPort; port++ {
		in.Ports = append(in.Ports, port)
	}
	eth0, eth1 := policy.Device{Name: "eth0", Index: r.device["eth0"]}, policy.Device{Name: "eth1", Index: r.device["eth1"]}
	for _, f := range families {
		in.Sources = append(in.Sources, policy.Rule{Prefix: f.pods, Origin: "test"})
		in.Native = append(in.Native, policy.Rule{Prefix: f.natives, Origin: "test"})
		in.HostAddrs = append(in.HostAddrs, f.node, f.node2, f.gateway)
	}
	eth0.IPv4, eth0.IPv6 = families[0].node, families[1].node
	eth1.IPv4, eth1.IPv6 = families[0].node2, families[1].node2
	in.Devices = []policy.Device{eth0, eth1}
	return in
}

// eachFamily runs a test for both families on one rig, each time without flows.
func eachFamily(t *testing.T, r *rig, f func(*rig, family)) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) {
			r := r.on(t)
			r.clear()
			f(r, fam)
		})
	}
}

// kind is a kind of packet from f.pod to f.remote that opens a mapping.
type kind struct {
	name string
	p    packet.Packet
}

func (f family) tcp(flags uint8) packet.Packet {
	return packet.Packet{Src: f.pod, Dst: f.remote, Proto: packet.TCP, SrcPort: keptPort, DstPort: 443, Flags: flags, Seq: 1000, Ack: 2000,
		Payload: []byte("some payload")}
}

func (f family) udp() packet.Packet {
	return packet.Packet{Src: f.pod, Dst: f.remote, Proto: packet.UDP, SrcPort: keptPort, DstPort: 53, ID: 99, Payload: []byte("some payload")}
}

func (f family) ping(id uint16) packet.Packet {
	return packet.Packet{Src: f.pod, Dst: f.remote, Proto: f.icmp, Type: f.echo, Ident: id, Payload: []byte("ping payload")}
}

func (f family) bare(proto uint8) packet.Packet {
	return packet.Packet{Src: f.pod, Dst: f.remote, Proto: proto, Payload: []byte{0, 0, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}
}

// kinds returns every kind of transport and of IP header.
func (f family) kinds() []kind {
	with := func(p packet.Packet, change func(*packet.Packet)) packet.Packet {
		change(&p)
		return p
	}
	out := []kind{
		{"TCP SYN", with(f.tcp(packet.SYN), func(p *packet.Packet) { p.Payload = nil })},
		{"TCP", f.tcp(packet.ACK | packet.PSH)},
		{"UDP", f.udp()},
		{"UDP without checksum", with(f.udp(), func(p *packet.Packet) { p.NoChecksum = true })},
		{"UDP-Lite", with(f.udp(), func(p *packet.Packet) { p.Proto = packet.UDPLite })},
		{"UDP-Lite header only", with(f.udp(), func(p *packet.Packet) { p.Proto, p.Coverage = packet.UDPLite, 8 })},
		{"SCTP", with(f.udp(), func(p *packet.Packet) { p.Proto, p.Seq = packet.SCTP, 7 })},
		{"ICMP echo", f.ping(4711)},
		{"GRE", f.bare(packet.GRE)},
		{"ESP", f.bare(packet.ESP)},
		{"protocol 253", f.bare(253)},
	}
	if f.name == "IPv4" {
		return append(out,
			kind{"ICMP timestamp", with(f.ping(4712), func(p *packet.Packet) { p.Type = 13 })},
			kind{"TCP, options", with(f.tcp(packet.SYN), func(p *packet.Packet) { p.Options = []byte{7, 7, 4, 0, 0, 0, 0} })},
			kind{"UDP, options", with(f.udp(), func(p *packet.Packet) { p.Options = make([]byte, 40) })},
			kind{"AH", f.bare(packet.AH)},
		)
	}
	for _, x := range []struct {
		name string
		ext  []packet.Extension
	}{
		{"hop-by-hop", []packet.Extension{{Proto: packet.HopByHop}}},
		{"routing", []packet.Extension{{Proto: packet.Routing, Body: make([]byte, 22)}}},
		{"destination", []packet.Extension{{Proto: packet.Destination, Body: make([]byte, 9)}}},
		{"AH", []packet.Extension{{Proto: packet.AH, Body: make([]byte, 26)}}},
		{"atomic fragment", []packet.Extension{{Proto: packet.Fragment}}},
		{"six headers", []packet.Extension{{Proto: packet.HopByHop}, {Proto: packet.Destination}, {Proto: packet.Routing},
			{Proto: packet.Fragment}, {Proto: packet.AH, Body: make([]byte, 10)}, {Proto: packet.Destination}}},
	} {
		for _, k := range []kind{{"TCP", f.tcp(packet.SYN)}, {"UDP", f.udp()}, {"echo", f.ping(4713)}, {"GRE", f.bare(packet.GRE)}} {
			k.p.Extensions = x.ext
			out = append(out, kind{k.name + ", " + x.name, k.p})
		}
	}
	return out
}

// kindsOnLinks returns the kinds on every kind of link.
func (f family) kindsOnLinks() []kind {
	var out []kind
	for link, name := range []string{"Ethernet", "VLAN", "QinQ", "raw"} {
		for _, k := range f.kinds() {
			k.name, k.p.Link = fmt.Sprintf("%s, %s", k.name, name), packet.Link(link)
			out = append(out, k)
		}
	}
	return out
}

func prefixOf(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
