package devices

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// podPrefixes are device names that belong to container networks (Cilium's list).
var podPrefixes = []string{"cilium_", "lo", "lxc", "cni", "docker"}

// verdict on a device, and the reason for either answer.
type verdict struct {
	selected bool
	reason   string
}

func skip(format string, args ...any) verdict { return verdict{reason: fmt.Sprintf(format, args...)} }

func take(format string, args ...any) verdict {
	return verdict{selected: true, reason: fmt.Sprintf(format, args...)}
}

// judge decides about one device: the configuration first, then, for what it
// does not name, the rules below; a device that is attached already stays
// whatever those say.
func (n *node) judge(l Link) verdict {
	if l.Name == "" {
		return skip("link not seen yet")
	}
	if pattern, ok := n.patterns.excludes(l.Name); ok {
		return skip("excluded by %s", pattern)
	}
	if n.patterns.names(l.Name) {
		return take("named")
	}
	pattern, included := n.patterns.includes(l.Name)
	v := n.candidate(l)
	switch {
	case v.reason != "": // not usable
	case included:
		v = take("matches %s", pattern)
		if l.Flags&unix.IFF_LOOPBACK != 0 { // "+" alone, "l+"
			v = skip("excluded flag set (mask=0x%x, flags=0x%x)", unix.IFF_LOOPBACK, l.Flags)
		}
	case !n.patterns.automatic():
		v = skip("not matching user filter %s", n.patterns)
	default:
		v = n.detect(l)
	}
	if !v.selected && slices.Contains(n.Attached, l.Name) && (included || n.patterns.automatic()) {
		return take("attached, stays until deleted or excluded (now: %s)", v.reason)
	}
	return v
}

// candidate asks what Cilium asks of every device, also of one that a pattern
// includes.
func (n *node) candidate(l Link) verdict {
	if len(n.addrs[l.Index]) == 0 {
		return skip("device has no addresses")
	}
	if !l.Up() {
		return skip("missing required flag (mask=0x%x, flags=0x%x)", unix.IFF_UP, l.Flags)
	}
	return verdict{}
}

// detect is Cilium's auto-detection: the same tests in the same order with the
// same reasons (pkg/datapath/linux/devices_controller.go), except that
//   - pod-side devices are told by addresses and routes too, not by name only;
//   - of the local table's routes none counts as global unicast: by those, every
//     device with an address would pass, such as a dummy with a node's /32;
//   - a default route counts as a global unicast route, and so does a next hop
//     of a multipath route;
//   - masquerade-forwarded asks for a default route.
func (n *node) detect(l Link) verdict {
	if mask := uint32(unix.IFF_SLAVE | unix.IFF_LOOPBACK); l.Flags&mask != 0 {
		return skip("excluded flag set (mask=0x%x, flags=0x%x)", mask, l.Flags)
	}
	if l.Master != 0 {
		return skip("bridged or bonded to ifindex %d", l.Master)
	}
	for _, p := range podPrefixes {
		if strings.HasPrefix(l.Name, p) {
			return skip("excluded prefix %q", p)
		}
	}
	if reason := n.podSide(l); reason != "" {
		return skip("%s", reason)
	}
	inMain := func(r Route) bool { return r.Default() && r.Table == unix.RT_TABLE_MAIN }
	switch {
	case l.Kind == "veth" && !slices.ContainsFunc(n.via[l.Index], inMain):
		return skip("veth without default route")
	case l.Kind == "bridge" || l.Kind == "openvswitch":
		return skip("bridge-like device, use --devices to override")
	case l.Hardware == "infiniband":
		// Its packets begin with neither an Ethernet nor an IP header.
		return skip("IPoIB device, use --devices to override")
	case !slices.ContainsFunc(n.via[l.Index], func(r Route) bool { return r.Default() || r.Dst.Addr().IsGlobalUnicast() }):
		return skip("no global unicast routes")
	case n.Forwarded && !n.hasDefault(l):
		return skip("no default route (masquerade-forwarded)")
	}
	return take("auto-detected")
}

// hasDefault counts default routes of every table: with policy routing each
// uplink has its own.
func (n *node) hasDefault(l Link) bool { return slices.ContainsFunc(n.via[l.Index], Route.Default) }

// podSide says why the device belongs to the pods' side, or "": it has an
// address inside a source range, or a route into one. Two things tell an uplink
// from that where pods have addresses of the node's own network, as in a cloud
// VPC, or where the range is that of the whole cluster: a default route, and that
// the route leads to a router outside the range, that is, to another node.
func (n *node) podSide(l Link) string {
	if n.hasDefault(l) {
		return ""
	}
	for _, a := range n.addrs[l.Index] {
		if r, ok := n.inRange(single(a.Addr)); ok {
			return fmt.Sprintf("pod-side: address %s is inside source range %s", a.Addr, r)
		}
	}
	for _, route := range n.via[l.Index] {
		r, ok := n.inRange(route.Dst)
		if !ok {
			continue
		}
		for _, h := range route.Hops {
			if h.Index == l.Index && (!h.Gateway.IsValid() || r.Contains(h.Gateway)) {
				return fmt.Sprintf("pod-side: route %s leads into source range %s", route.Dst, r)
			}
		}
	}
	return ""
}
