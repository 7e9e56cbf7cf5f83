package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AddAddr adds an address to a device. On a device that carries traffic it is
// usable when the function returns.
func (ns *NS) AddAddr(dev string, p netip.Prefix) error {
	ready := false
	err := ns.change(dev, "add address "+p.String(), func(l netlink.Link) error {
		ready = l.Attrs().OperState == netlink.OperUp
		return netlink.AddrAdd(l, address(p))
	})
	if err == nil && ready && p.Addr().Is6() {
		err = ns.awaitReady(dev)
	}
	return err
}

// DelAddr removes an address from a device.
func (ns *NS) DelAddr(dev string, p netip.Prefix) error {
	return ns.change(dev, "delete address "+p.String(), func(l netlink.Link) error {
		return netlink.AddrDel(l, address(p))
	})
}

// Addrs returns the global addresses of a device, IPv4 first, in the kernel's order.
func (ns *NS) Addrs(dev string) (prefixes []netip.Prefix, err error) {
	err = ns.change(dev, "list addresses", func(l netlink.Link) error {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && a.Scope == unix.RT_SCOPE_UNIVERSE {
				ones, _ := a.Mask.Size()
				prefixes = append(prefixes, netip.PrefixFrom(ip.Unmap(), ones))
			}
		}
		return err
	})
	return prefixes, err
}

func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// ipNet keeps the host bits: it serves addresses as well as routes.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Route is a route. Dst is a must, and one of Via and Dev.
type Route struct {
	Dst    netip.Prefix // DefaultRoute4 and DefaultRoute6 are the default routes
	Via    netip.Addr
	Dev    string
	Src    netip.Addr
	Metric int
	MTU    int
	Table  int // 0 = main
}

// The destinations of default routes.
var (
	DefaultRoute4 = netip.MustParsePrefix("0.0.0.0/0")
	DefaultRoute6 = netip.MustParsePrefix("::/0")
)

// AddRoute adds a route, or replaces the one with the same destination, metric and table.
func (ns *NS) AddRoute(r Route) error {
	k, err := ns.route(r)
	if err == nil {
		err = ns.Do(func() error { return netlink.RouteReplace(k) })
	}
	if err != nil {
		return fmt.Errorf("route %s via %s dev %s in %s: %w", r.Dst, r.Via, r.Dev, ns, err)
	}
	return nil
}

// DelRoute deletes a route.
func (ns *NS) DelRoute(r Route) error {
	k, err := ns.route(r)
	if err == nil {
		err = ns.Do(func() error { return netlink.RouteDel(k) })
	}
	if err != nil {
		return fmt.Errorf("delete route %s in %s: %w", r.Dst, ns, err)
	}
	return nil
}

func (ns *NS) route(r Route) (*netlink.Route, error) {
	k := &netlink.Route{Dst: ipNet(r.Dst.Masked()), Priority: r.Metric, MTU: r.MTU, Table: r.Table}
	if r.Dev != "" {
		l, err := ns.link(r.Dev)
		if err != nil {
			return nil, err
		}
		k.LinkIndex = l.Attrs().Index
	}
	if r.Src.IsValid() {
		k.Src = r.Src.AsSlice()
	}
	if r.Via.IsValid() {
		k.Gw = r.Via.AsSlice()
	} else if r.Dst.Addr().Is4() {
		k.Scope = netlink.SCOPE_LINK
	}
	return k, nil
}

// AddRule makes packets with a source in the prefix use a table of their own.
func (ns *NS) AddRule(from netip.Prefix, table int) error {
	rule := netlink.NewRule()
	rule.Src = ipNet(from)
	rule.Table = table
	rule.Family = unix.AF_INET
	if from.Addr().Is6() {
		rule.Family = unix.AF_INET6
	}
	if err := ns.Do(func() error { return netlink.RuleAdd(rule) }); err != nil {
		return fmt.Errorf("rule from %s table %d in %s: %w", from, table, ns, err)
	}
	return nil
}
