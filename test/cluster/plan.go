package cluster

import (
	"fmt"
	"net/netip"

	"bauta.dev/bauta/internal/lab"
)

// The address plan. Nothing writes these.
var (
	// PodRange4 and PodRange6 hold the pods of all nodes.
	PodRange4 = netip.MustParsePrefix("10.244.0.0/16")
	PodRange6 = netip.MustParsePrefix("fd00:244::/48")
	// ServiceRange4 and ServiceRange6 hold the cluster addresses of Services.
	ServiceRange4 = netip.MustParsePrefix("10.96.0.0/16")
	ServiceRange6 = netip.MustParsePrefix("fd00:96::/112")

	// Gateway is the fabric's own address on the network of the nodes.
	Gateway = pair("192.0.2.1", "2001:db8:2::1")
	// World is an address of the outside that no exclusion covers, neither one of the
	// defaults: a special purpose that is not among them.
	World = pair("192.175.48.10", "2001:db8:99::10")
	// Friend is an address of the outside that can answer pods: what an excluded
	// destination has in reality.
	Friend = pair("198.51.100.20", "2001:db8:99::20")
	// Private is one of RFC 1918, behind the gateway, that can answer pods as well.
	Private = pair("10.20.0.1", "fd00:20::1")

	plane = nodeAddr(0)
)

const (
	apiPort = 6443
	// maxNodes keeps node addresses apart from the gateway's.
	maxNodes = 100
)

// nodeAddr is the address of node i, counted from 1; 0 is the control plane.
func nodeAddr(i int) lab.Pair {
	return pair(fmt.Sprintf("192.0.2.%d", 10+i), fmt.Sprintf("2001:db8:2::%x", 10+i))
}

func nodeName(i int) string { return fmt.Sprintf("node%d", i) }

func pair(v4, v6 string) lab.Pair {
	return lab.Pair{V4: netip.MustParseAddr(v4), V6: netip.MustParseAddr(v6)}
}

// onLink is the pair with the prefix lengths of the nodes' network.
func onLink(p lab.Pair) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(p.V4, 24), netip.PrefixFrom(p.V6, 64)}
}

func hosts(p lab.Pair) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(p.V4, 32), netip.PrefixFrom(p.V6, 128)}
}
