// Package devices finds the masquerade devices of a node and the addresses it
// masquerades with.
//
// Read takes a Snapshot of links, addresses and routes by netlink. Select turns
// it into a Selection and is pure: the same snapshot and options give the same
// result, so every rule is tested as text. Watch says when to read again; what a
// notification says is never used, only that there was one.
//
// A node's network is what it is right now, but the set of masquerade devices
// has a memory: a device that was selected stays until it is deleted or the
// configuration excludes it (Options.Attached).
package devices

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Snapshot is the network configuration of one network namespace. The order of
// Addrs is the kernel's: for IPv4 the oldest primary address of a device first,
// for IPv6 the newest; it is the order in which the kernel itself prefers them.
type Snapshot struct {
	Links  []Link
	Addrs  []Addr
	Routes []Route
	States []Tunnel // of xfrm: what IPsec exchanges
}

// TunnelPorts returns the UDP ports on which tunnels of the node receive, sorted,
// each once.
func (s Snapshot) TunnelPorts() []uint16 {
	var ports []uint16
	for _, l := range s.Links {
		if l.Port != 0 {
			ports = append(ports, l.Port)
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

// Link is a network device.
type Link struct {
	Index    int
	Name     string
	Kind     string // rtnetlink's kind ("veth", "bridge"); "device" for hardware
	Hardware string // ARPHRD type by its name in `ip link` ("ether", "none", "ppp")
	Flags    uint32 // IFF_*
	Master   int    // ifindex of the bridge, bond or VRF; 0: none
	Port     uint16 // UDP port on which a VXLAN or Geneve tunnel receives; 0: none is known

	Tunnels []Tunnel // what it sends and receives itself
}

// Up tells whether the device is administratively up.
func (l Link) Up() bool { return l.Flags&unix.IFF_UP != 0 }

// Ethernet tells whether packets at the device's tc hooks begin with an Ethernet
// header. lo has one, of zeroes; tunnels, PPP and raw IP devices have none.
func (l Link) Ethernet() bool { return l.Hardware == "ether" || l.Hardware == "loopback" }

// Addr is an address of a device.
type Addr struct {
	Index     int // of the device
	Addr      netip.Addr
	Subnet    netip.Prefix // what is on-link by it: with a peer, the peer's
	Broadcast netip.Addr   // as configured; zero: not configured
	Scope     int          // RT_SCOPE_*

	Secondary  bool // IPv4: another address of the subnet came first
	Temporary  bool // IPv6: a privacy address (RFC 8981)
	Deprecated bool // preferred lifetime is over
	Tentative  bool // duplicate address detection still runs
	DADFailed  bool // another host has the address
}

// RouteType is the kind of a route. Others are not in a Snapshot: no packet
// leaves by them.
type RouteType int

const (
	Unicast RouteType = iota
	Local
	Anycast
)

// Route is a route of any table.
type Route struct {
	Dst    netip.Prefix
	Type   RouteType
	Table  int
	Metric int
	TOS    int
	Source netip.Addr // explicit source address; zero: none
	Hops   []Hop      // several: multipath
}

// Default tells whether the route is a default route that packets leave by.
func (r Route) Default() bool { return r.Type == Unicast && r.Dst.Bits() == 0 }

// Hop is a next hop of a route.
type Hop struct {
	Index   int        // of the device
	Gateway netip.Addr // of the route's family; zero: on-link
}
