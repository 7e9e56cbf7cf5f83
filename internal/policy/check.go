package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// MaxPrefixes bounds the ip-masq-agent list, per family (section 5). The
// link-local prefix that the agent adds to a list by itself is not counted.
const MaxPrefixes = 65536

var linkLocal4 = netip.MustParsePrefix("169.254.0.0/16")

// check refuses what a rendering could not express. It goes through the fields in
// a fixed order, so that the same input always gives the same error.
func (in Input) check() error {
	for _, list := range []struct {
		name  string
		rules []Rule
	}{
		{"source range", in.Sources},
		{"native-routing CIDR", in.Native},
		{"non-masquerade CIDR", in.NonMasq},
		{"pod range", in.Pods},
	} {
		for _, r := range list.rules {
			if !canonical(r.Prefix) {
				return fmt.Errorf("%s %s (%s): not a canonical prefix", list.name, r.Prefix, r.Origin)
			}
		}
	}
	var count [2]int
	for _, r := range in.NonMasq {
		if r.Prefix != linkLocal4 && r.Prefix != linkLocal6 {
			count[family(r.Prefix.Addr())]++
		}
	}
	if n := max(count[0], count[1]); n > MaxPrefixes {
		return fmt.Errorf("non-masquerade list: %d prefixes in one family, the limit is %d", n, MaxPrefixes)
	}
	for _, a := range in.HostAddrs {
		if !plain(a.WithZone("")) {
			return fmt.Errorf("node's own address %s: not an IPv4 or IPv6 address", a)
		}
	}
	for _, n := range in.Nodes {
		if !plain(n.Addr) {
			return fmt.Errorf("node %s: address %s: not an IPv4 or IPv6 address without a zone", n.Node, n.Addr)
		}
	}
	if err := in.checkOptions(); err != nil {
		return err
	}
	if err := in.checkDevices(); err != nil {
		return err
	}
	return in.checkRoutes()
}

func (in Input) checkOptions() error {
	switch in.RemoteNodes {
	case RemoteNone, RemoteExternal, RemoteAll:
	default:
		return fmt.Errorf("remote-node-masquerade %q: want none, external or all", in.RemoteNodes)
	}
	switch in.UnknownProtocols {
	case UnknownMasquerade, UnknownDrop, UnknownPass:
	default:
		return fmt.Errorf("unknown-protocols %q: want masquerade, drop or pass", in.UnknownProtocols)
	}
	t := in.Timeouts
	if shortest := min(t.TCPSyn, t.TCPEstablished, t.TCPClosing, t.UDP, t.UDPStream, t.ICMP, t.Other); shortest < time.Second {
		return fmt.Errorf("nat-timeout %s: shorter than a second", shortest)
	}
	for i, port := range in.Ports {
		if port == 0 || i > 0 && port <= in.Ports[i-1] {
			return fmt.Errorf("external ports: %d: want ascending ports from 1, each once", port)
		}
	}
	if len(in.Devices) > 0 && len(in.Ports) == 0 {
		return errors.New("external ports: none is left of snat-port-range without node-port-range and reserved ports")
	}
	return nil
}

func (in Input) checkDevices() error {
	names := make(map[int]string)
	for _, d := range in.Devices {
		if d.Index <= 0 {
			return fmt.Errorf("device %s: index %d: want a positive number", d.Name, d.Index)
		}
		if other, ok := names[d.Index]; ok {
			return fmt.Errorf("device %s: index %d: device %s has it too", d.Name, d.Index, other)
		}
		names[d.Index] = d.Name
		if d.IPv4.IsValid() && !(source(d.IPv4) && d.IPv4.Is4()) {
			return fmt.Errorf("device %s: masquerade address %s: not an IPv4 address of a host", d.Name, d.IPv4)
		}
		if d.IPv6.IsValid() && !(source(d.IPv6) && d.IPv6.Is6()) {
			return fmt.Errorf("device %s: masquerade address %s: not an IPv6 address of a host", d.Name, d.IPv6)
		}
		for _, a := range d.Broadcasts {
			if !a.Is4() {
				return fmt.Errorf("device %s: broadcast address %s: not an IPv4 address", d.Name, a)
			}
		}
	}
	return nil
}

func (in Input) checkRoutes() error {
	for _, r := range in.RouteSources {
		switch {
		case !canonical(r.Prefix):
			return fmt.Errorf("route %s: not a canonical prefix", r.Prefix)
		case r.Source.IsValid() && !(source(r.Source) && r.Source.Is4() == r.Prefix.Addr().Is4()):
			return fmt.Errorf("route %s: source %s: not an address of a host in the route's family", r.Prefix, r.Source)
		}
	}
	return nil
}

// canonical tells whether p is the only way to write this set of addresses:
// without host bits, and IPv4 as IPv4.
func canonical(p netip.Prefix) bool {
	return p.IsValid() && p == p.Masked() && !p.Addr().Is4In6()
}

// plain tells whether a is an address that can stand in a packet header.
func plain(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == ""
}

// source tells whether packets can leave with source a.
func source(a netip.Addr) bool {
	return plain(a) && !a.IsUnspecified() && !a.IsMulticast()
}
