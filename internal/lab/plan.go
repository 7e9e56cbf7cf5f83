package lab

import (
	"fmt"
	"net/netip"
)

// Pair is the IPv4 and the IPv6 address of something.
type Pair struct{ V4, V6 netip.Addr }

// Of returns the address of the same family as the other address.
func (p Pair) Of(other netip.Addr) netip.Addr {
	if other.Is4() {
		return p.V4
	}
	return p.V6
}

// All returns both addresses, IPv4 first.
func (p Pair) All() []netip.Addr { return []netip.Addr{p.V4, p.V6} }

func pair(v4, v6 string) Pair {
	return Pair{netip.MustParseAddr(v4), netip.MustParseAddr(v6)}
}

// hosts is the pair as two single-address prefixes.
func (p Pair) hosts() []netip.Prefix { return p.prefixes(32, 128) }

func (p Pair) prefixes(bits4, bits6 int) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(p.V4, bits4), netip.PrefixFrom(p.V6, bits6)}
}

// The address plan of the standard topology: see the drawing of the package.
// The values are constants that Go can't declare as such; nothing writes them.
var (
	// PodRange4 and PodRange6 hold the pods of the node.
	PodRange4 = netip.MustParsePrefix("10.0.1.0/24")
	PodRange6 = netip.MustParsePrefix("fd00:1::/64")
	// RemotePodRange4 and RemotePodRange6 hold the pods of the remote node.
	RemotePodRange4 = netip.MustParsePrefix("10.0.2.0/24")
	RemotePodRange6 = netip.MustParsePrefix("fd00:2::/64")
	// UplinkRange4 and UplinkRange6 are the network of the node's eth0.
	UplinkRange4 = netip.MustParsePrefix("192.0.2.0/24")
	UplinkRange6 = netip.MustParsePrefix("2001:db8:2::/64")

	podGateway   = pair("10.0.1.1", "fd00:1::1")
	nodeAddr     = pair("192.0.2.1", "2001:db8:2::1")
	worldAddr    = pair("192.0.2.2", "2001:db8:2::2")
	remoteAddr   = pair("192.0.2.3", "2001:db8:2::3")
	routerInner  = pair("192.0.2.254", "2001:db8:2::fe")
	routerOuter  = pair("198.18.0.1", "2001:db8:18::1")
	farWorldAddr = pair("198.18.0.2", "2001:db8:18::2")
	node2Addr    = pair("203.0.113.1", "2001:db8:3::1")
	world2Addr   = pair("203.0.113.2", "2001:db8:3::2")
	remotePod    = pair("10.0.2.2", "fd00:2::2")

	// excluded is on the loopback device of the world.
	excluded       = pair("198.51.100.10", "2001:db8:99::1")
	excluded10     = netip.MustParseAddr("10.99.0.1")
	remoteExternal = netip.MustParseAddr("198.51.100.77")
)

// podAddr is the address of pod i, counted from 0.
func podAddr(i int) Pair {
	return pair(fmt.Sprintf("10.0.1.%d", 2+i), fmt.Sprintf("fd00:1::%x", 2+i))
}

// maxPods keeps pod addresses inside PodRange4.
const maxPods = 250
