package devices

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// readAttempts bounds how often Read starts again. A dump is interrupted by a
// change during the dump (milliseconds), so several in a row are rare even while
// pods come and go.
const readAttempts = 10

// errTorn says that the parts of a snapshot do not fit together.
var errTorn = errors.New("links, addresses and routes are of different moments")

// Read takes a snapshot of the calling thread's network namespace. Links,
// addresses and routes are separate dumps: when one was interrupted by a change,
// or when they refer to a link that is not there, all are read again. A kernel
// without IPv6 has no addresses and routes of that family.
func Read() (Snapshot, error) {
	var err error
	for range readAttempts {
		var s Snapshot
		if s, err = read(); err == nil {
			return s, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, errTorn) {
			break
		}
	}
	return Snapshot{}, err
}

func read() (Snapshot, error) {
	var s Snapshot
	links, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("list links: %w", err)
	}
	known := make(map[int]bool, len(links))
	for _, l := range links {
		s.Links = append(s.Links, newLink(l))
		known[l.Attrs().Index] = true
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return s, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range addrs {
		if !known[a.LinkIndex] {
			return s, fmt.Errorf("address %s: %w", a.IPNet, errTorn)
		}
		if addr, ok := newAddr(a); ok {
			s.Addrs = append(s.Addrs, addr)
		}
	}
	// One family at a time: a dump of all families also lists MPLS and multicast
	// routes. A kernel without IPv6 answers a dump of it with all families, from
	// which netlink drops the rest.
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		err := netlink.RouteListFilteredIter(family, &netlink.Route{}, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			if route, ok := newRoute(r); ok {
				s.Routes = append(s.Routes, route)
			}
			return true
		})
		if family == netlink.FAMILY_V6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)) {
			continue
		}
		if err != nil {
			return s, fmt.Errorf("list routes: %w", err)
		}
	}
	for _, r := range s.Routes {
		for _, h := range r.Hops {
			if !known[h.Index] {
				return s, fmt.Errorf("route %s: %w", r.Dst, errTorn)
			}
		}
	}
	s.States, err = readStates()
	return s, err
}

func newLink(l netlink.Link) Link {
	a := l.Attrs()
	return Link{
		Index: a.Index, Name: a.Name, Kind: l.Type(), Hardware: a.EncapType,
		Flags: a.RawFlags, Master: a.MasterIndex, Port: tunnelPort(l), Tunnels: linkTunnels(l),
	}
}

// tunnelPort is where the kernel itself receives a tunnel's packets. That of
// WireGuard is not part of the link, and netlink has no code to ask for it.
func tunnelPort(l netlink.Link) uint16 {
	switch l := l.(type) {
	case *netlink.Vxlan:
		return uint16(l.Port)
	case *netlink.Geneve:
		return l.Dport
	}
	return 0
}

func newAddr(a netlink.Addr) (Addr, bool) {
	own, ok := prefix(a.IPNet)
	if !ok {
		return Addr{}, false
	}
	subnet := own
	if peer, ok := prefix(a.Peer); ok {
		subnet = peer
	}
	flag := func(f int) bool { return a.Flags&f != 0 }
	is4 := own.Addr().Is4()
	return Addr{
		Index: a.LinkIndex, Addr: own.Addr(), Subnet: subnet.Masked(), Broadcast: addr(a.Broadcast), Scope: a.Scope,
		// One bit with two names (linux/if_addr.h).
		Secondary:  is4 && flag(unix.IFA_F_SECONDARY),
		Temporary:  !is4 && flag(unix.IFA_F_TEMPORARY),
		Deprecated: flag(unix.IFA_F_DEPRECATED),
		// An optimistic address is in use while it is being checked (RFC 4429).
		Tentative: flag(unix.IFA_F_TENTATIVE) && !flag(unix.IFA_F_OPTIMISTIC),
		DADFailed: flag(unix.IFA_F_DADFAILED),
	}, true
}

var routeTypes = map[int]RouteType{unix.RTN_UNICAST: Unicast, unix.RTN_LOCAL: Local, unix.RTN_ANYCAST: Anycast}

func newRoute(r netlink.Route) (Route, bool) {
	kind, ok := routeTypes[r.Type]
	if !ok {
		return Route{}, false
	}
	dst, ok := prefix(r.Dst)
	if !ok {
		return Route{}, false
	}
	route := Route{
		Dst: dst.Masked(), Type: kind, Table: r.Table, Metric: r.Priority, TOS: r.Tos, Source: addr(r.Src),
	}
	if len(r.MultiPath) == 0 && r.LinkIndex != 0 {
		route.Hops = []Hop{{Index: r.LinkIndex, Gateway: addr(r.Gw)}}
	}
	for _, h := range r.MultiPath {
		route.Hops = append(route.Hops, Hop{Index: h.LinkIndex, Gateway: addr(h.Gw)})
	}
	return route, true
}

// addr returns the zero Addr for nil.
func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	bits, size := n.Mask.Size()
	a, ok := netip.AddrFromSlice(n.IP)
	if size == 32 {
		a = a.Unmap() // netlink gives an IPv4 default route the 16-byte zero address
	}
	if !ok || a.BitLen() != size {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, bits), true
}
