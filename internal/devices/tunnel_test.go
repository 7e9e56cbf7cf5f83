package devices

import (
	"net"
	"net/netip"
	"reflect"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel of the tests has none of these devices: the links are what netlink
// would give.
func TestTunnels(t *testing.T) {
	a, b := net.IPv4(192, 0, 2, 1).To4(), net.IPv4(192, 0, 2, 9).To4()
	a6, b6 := net.ParseIP("2001:db8::1"), net.ParseIP("2001:db8::9")
	remote4, remote6 := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	tun := func(remote netip.Addr, port uint16, protos ...uint8) (list []Tunnel) {
		for _, p := range protos {
			list = append(list, Tunnel{p, remote, port})
		}
		return list
	}
	up := netlink.LinkAttrs{RawFlags: unix.IFF_UP}
	for _, c := range []struct {
		name string
		link netlink.Link
		want []Tunnel
	}{
		{"gre", &netlink.Gretun{LinkAttrs: up, Local: a, Remote: b}, tun(remote4, 0, 47)},
		{"gre, any remote", &netlink.Gretun{LinkAttrs: up, Local: a, Remote: net.IPv4zero.To4()}, tun(any4, 0, 47)},
		{"gre, flow based", &netlink.Gretun{LinkAttrs: up, FlowBased: true}, []Tunnel{{47, any4, 0}, {47, any6, 0}}},
		{"gre that is down", &netlink.Gretun{Local: net.IPv4zero.To4()}, nil},
		{"ip6gre", &netlink.Gretun{LinkAttrs: up, Local: a6, Remote: b6}, tun(remote6, 0, 47)},
		{"gretap", &netlink.Gretap{LinkAttrs: up, Local: a, Remote: b}, tun(remote4, 0, 47)},
		{"ipip", &netlink.Iptun{LinkAttrs: up, Local: a, Remote: b, Proto: unix.IPPROTO_IPIP}, tun(remote4, 0, 4)},
		{"tunl0 of a cluster", &netlink.Iptun{LinkAttrs: up, Local: net.IPv4zero.To4(), Remote: net.IPv4zero.To4(), Proto: unix.IPPROTO_IPIP}, tun(any4, 0, 4)},
		{"ipip, any protocol", &netlink.Iptun{LinkAttrs: up, Local: a, Remote: b}, tun(remote4, 0, 4, 137)},
		{"ipip in UDP", &netlink.Iptun{LinkAttrs: up, Local: a, Remote: b, Proto: 4, EncapType: 1, EncapDport: 5555}, tun(remote4, 5555, 17)},
		{"sit", &netlink.Sittun{LinkAttrs: up, Local: a, Remote: b, Proto: unix.IPPROTO_IPV6}, tun(remote4, 0, 41)},
		{"ip6tnl", &netlink.Ip6tnl{LinkAttrs: up, Local: a6, Remote: b6}, tun(remote6, 0, 4, 41, 137)},
		{"ip6tnl, any remote", &netlink.Ip6tnl{LinkAttrs: up, Local: a6, Proto: 41}, tun(any6, 0, 41)},
		{"vti", &netlink.Vti{LinkAttrs: up, Local: a, Remote: b}, tun(remote4, 0, 50, 51, 108)},
		{"erspan", &netlink.GenericLink{LinkAttrs: up, LinkType: "erspan"}, []Tunnel{{47, any4, 0}, {47, any6, 0}}},
		{"vxlan", &netlink.Vxlan{LinkAttrs: up, Port: 4789, Group: b}, []Tunnel{{17, any4, 4789}, {17, any6, 4789}}},
		{"geneve", &netlink.Geneve{LinkAttrs: up, Dport: 6081, Remote: b}, []Tunnel{{17, any4, 6081}, {17, any6, 6081}}},
		{"veth", &netlink.Veth{LinkAttrs: up}, nil},
	} {
		s := Snapshot{Links: []Link{newLink(c.link), newLink(c.link)}}
		if got := s.Tunnels(); len(got)+len(c.want) > 0 && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestStateTunnels(t *testing.T) {
	a, b := net.IPv4(192, 0, 2, 1).To4(), net.IPv4(192, 0, 2, 9).To4()
	a6, b6 := net.ParseIP("2001:db8::1"), net.ParseIP("2001:db8::9")
	got := Snapshot{States: stateTunnels([]netlink.XfrmState{
		{Src: a, Dst: b, Proto: netlink.XFRM_PROTO_ESP, Spi: 1},
		{Src: b, Dst: a, Proto: netlink.XFRM_PROTO_ESP, Spi: 2},
		{Src: a6, Dst: b6, Proto: netlink.XFRM_PROTO_AH, Spi: 3},
		{Src: a, Dst: b, Proto: netlink.XFRM_PROTO_COMP, Spi: 4, Mode: netlink.XFRM_MODE_TUNNEL},
		{Src: a, Dst: net.IPv4(198, 51, 100, 1), Proto: netlink.XFRM_PROTO_ESP, Spi: 5,
			Encap: &netlink.XfrmStateEncap{Type: netlink.XFRM_ENCAP_ESPINUDP, SrcPort: 4500, DstPort: 4500}},
	})}.Tunnels()
	v4, v4b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.9")
	v6, v6b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::9")
	want := []Tunnel{{50, v4, 0}, {50, v4b, 0}, {51, v6, 0}, {51, v6b, 0}, {108, v4, 0}, {108, v4b, 0}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A kernel that can't do IPsec has no states, and says so in some way.
func TestReadStates(t *testing.T) {
	namespace(t)
	if list, err := readStates(); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
}
