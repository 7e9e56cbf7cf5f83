package devices

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Tunnel is what the node itself exchanges with another host, without a socket
// that could be found: packets of a protocol without ports, or those of a UDP
// tunnel to the port where the other end receives.
type Tunnel struct {
	Proto  uint8
	Remote netip.Addr // unspecified: any of its family
	Port   uint16     // of the remote; 0 for a protocol without ports
}

func (t Tunnel) compare(o Tunnel) int {
	return cmp.Or(cmp.Compare(t.Proto, o.Proto), t.Remote.Compare(o.Remote), cmp.Compare(t.Port, o.Port))
}

// Tunnels returns what the node's tunnels and xfrm states exchange, sorted, each
// once. Tunnels that are down do not count: gre0, sit0 and their like are there
// wherever a module is loaded, for any remote.
func (s Snapshot) Tunnels() []Tunnel {
	list := slices.Clone(s.States)
	for _, l := range s.Links {
		if l.Up() {
			list = append(list, l.Tunnels...)
		}
	}
	slices.SortFunc(list, Tunnel.compare)
	return slices.Compact(list)
}

// linkTunnels is what a device exchanges if it is a tunnel.
func linkTunnels(l netlink.Link) []Tunnel {
	switch l := l.(type) {
	case *netlink.Vxlan:
		return to(nil, nil, uint16(l.Port), unix.IPPROTO_UDP)
	case *netlink.Geneve:
		return to(nil, nil, l.Dport, unix.IPPROTO_UDP)
	case *netlink.Gretun:
		return encapsulated(l.Remote, l.Local, l.EncapType, l.EncapDport, unix.IPPROTO_GRE)
	case *netlink.Gretap:
		return encapsulated(l.Remote, l.Local, l.EncapType, l.EncapDport, unix.IPPROTO_GRE)
	case *netlink.Iptun:
		return encapsulated(l.Remote, l.Local, l.EncapType, l.EncapDport, inner(l.Proto, unix.IPPROTO_IPIP, protoMPLS)...)
	case *netlink.Sittun:
		return encapsulated(l.Remote, l.Local, l.EncapType, l.EncapDport, inner(l.Proto, unix.IPPROTO_IPV6, unix.IPPROTO_IPIP, protoMPLS)...)
	case *netlink.Ip6tnl:
		return encapsulated(l.Remote, l.Local, l.EncapType, l.EncapDport, inner(l.Proto, unix.IPPROTO_IPV6, unix.IPPROTO_IPIP, protoMPLS)...)
	case *netlink.Vti:
		return to(l.Remote, l.Local, 0, unix.IPPROTO_ESP, unix.IPPROTO_AH, unix.IPPROTO_COMP)
	case *netlink.GenericLink:
		if l.LinkType == "erspan" || l.LinkType == "ip6erspan" {
			return to(nil, nil, 0, unix.IPPROTO_GRE)
		}
	}
	return nil
}

const protoMPLS = 137 // MPLS in IP, RFC 4023

// inner are the protocols that a tunnel device takes: one, or with mode "any" all.
func inner(one uint8, all ...uint8) []uint8 {
	if one != 0 {
		return []uint8{one}
	}
	return all
}

// encapsulated is what a tunnel exchanges that may be put into UDP (FOU, GUE).
func encapsulated(remote, local net.IP, encap, port uint16, protos ...uint8) []Tunnel {
	if encap != 0 {
		return to(remote, local, port, unix.IPPROTO_UDP)
	}
	return to(remote, local, 0, protos...)
}

// to lists protocols towards a remote. A tunnel without one has its local address
// for a family, or both families.
func to(remote, local net.IP, port uint16, protos ...uint8) []Tunnel {
	var ends []netip.Addr
	switch r, l := addr(remote), addr(local); {
	case r.IsValid() && !r.IsUnspecified():
		ends = []netip.Addr{r}
	case l.IsValid() && l.Is4():
		ends = []netip.Addr{netip.IPv4Unspecified()}
	case l.IsValid():
		ends = []netip.Addr{netip.IPv6Unspecified()}
	default:
		ends = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	var list []Tunnel
	for _, end := range ends {
		for _, p := range protos {
			list = append(list, Tunnel{Proto: p, Remote: end, Port: port})
		}
	}
	return list
}

// readStates lists what the xfrm states of the namespace exchange; a kernel
// without xfrm has none.
func readStates() ([]Tunnel, error) {
	states, err := netlink.XfrmStateList(netlink.FAMILY_ALL)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list xfrm states: %w", err)
	}
	return stateTunnels(states), nil
}

// stateTunnels: one end of a state is the node's, and no pod is masqueraded
// towards that, so both are listed. What goes through UDP has a socket.
func stateTunnels(states []netlink.XfrmState) []Tunnel {
	var list []Tunnel
	for _, s := range states {
		if s.Encap != nil {
			continue
		}
		for _, end := range []net.IP{s.Src, s.Dst} {
			if a := addr(end); a.IsValid() && !a.IsUnspecified() {
				list = append(list, Tunnel{Proto: uint8(s.Proto), Remote: a})
			}
		}
	}
	slices.SortFunc(list, Tunnel.compare)
	return slices.Compact(list)
}
