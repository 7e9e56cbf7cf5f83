package devices

import (
	"cmp"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

// Options say which devices to select. The zero value means auto-detection.
type Options struct {
	// Patterns: exact names, "eth+" prefixes and "!" exclusions of either. Empty,
	// or only exclusions: auto-detection.
	Patterns []string

	// Forwarded: every forwarded packet is a candidate, so auto-detection takes
	// only devices with a default route.
	Forwarded bool

	// Sources are the ranges the pods are in. Ranges that only say "everything"
	// (0.0.0.0/0, ::/0, fc00::/7 and shorter) are ignored: they do not tell the
	// pods' side from the other.
	Sources []netip.Prefix

	// RouteSource asks for Selection.RouteSources.
	RouteSource bool

	// Attached are the devices that masquerade already. They stay until they are
	// deleted or excluded by Patterns, whatever else they lose.
	Attached []string
}

// Selection is what a Snapshot means for masquerading. All lists are sorted and
// without duplicates.
type Selection struct {
	Devices   []Selected // by name
	Missing   []string   // names of Options.Patterns that no device has
	Unmatched []string   // prefixes of Options.Patterns that no device has: not a defect by itself
	Skipped   []Skipped  // by name: every other device

	// HostAddrs are the node's own addresses, without those of pod-side devices
	// inside a source range (line 2 of the contract).
	HostAddrs []netip.Addr

	RouteSources []policy.RouteSource // see Options.RouteSource

	// A unicast default route exists, in any table.
	DefaultRoute4, DefaultRoute6 bool
}

// Selected is a masquerade device.
type Selected struct {
	policy.Device
	Up     bool   `json:"up"`
	Reason string `json:"reason"` // why it is selected
	Why4   string `json:"why4"`   // why it masquerades with this IPv4 address, or why with none
	Why6   string `json:"why6"`
}

// Skipped is a device that is not selected.
type Skipped struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// PolicyDevices returns the devices as the policy takes them.
func (s Selection) PolicyDevices() []policy.Device {
	devices := make([]policy.Device, len(s.Devices))
	for i, d := range s.Devices {
		devices[i] = d.Device
	}
	return devices
}

// Select picks the masquerade devices and their addresses.
func Select(s Snapshot, opt Options) Selection {
	n := newNode(s, opt)
	var sel Selection
	for _, l := range n.links {
		verdict := n.judge(l)
		if !verdict.selected {
			sel.Skipped = append(sel.Skipped, Skipped{l.Name, verdict.reason})
			continue
		}
		n.selected[l.Index] = true
		sel.Devices = append(sel.Devices, Selected{
			Device: policy.Device{Name: l.Name, Index: l.Index, Ethernet: l.Ethernet(), Broadcasts: broadcasts(n.addrs[l.Index])},
			Up:     l.Up(),
			Reason: verdict.reason,
		})
	}
	// Only now: the address of a device may be that of another selected one.
	for i := range sel.Devices {
		d := &sel.Devices[i]
		d.IPv4, d.Why4 = n.masqueradeAddr(d.Index, v4)
		d.IPv6, d.Why6 = n.masqueradeAddr(d.Index, v6)
	}
	sel.Missing, sel.Unmatched = n.patterns.missing(n.links), n.patterns.unmatched(n.links)
	sel.HostAddrs = n.hostAddrs()
	if opt.RouteSource {
		sel.RouteSources = n.routeSources()
	}
	for _, r := range n.routes {
		if r.Default() {
			sel.DefaultRoute4 = sel.DefaultRoute4 || v4.has(r.Dst.Addr())
			sel.DefaultRoute6 = sel.DefaultRoute6 || v6.has(r.Dst.Addr())
		}
	}
	slices.SortFunc(sel.Devices, func(a, b Selected) int { return cmp.Or(cmp.Compare(a.Name, b.Name), a.Index-b.Index) })
	slices.SortFunc(sel.Skipped, func(a, b Skipped) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Reason, b.Reason))
	})
	return sel
}

// family is an address family.
type family int

const (
	v4 family = iota
	v6
)

func (f family) has(a netip.Addr) bool { return a.IsValid() && a.Is4() == (f == v4) }

func (f family) String() string { return [...]string{"IPv4", "IPv6"}[f] }

// node is a snapshot with its options, indexed by device.
type node struct {
	Options
	patterns patterns
	ranges   []netip.Prefix // the sources that tell where pods are

	links  []Link // by index
	byID   map[int]Link
	addrs  map[int][]Addr // in the kernel's order
	routes []Route
	via    map[int][]Route // unicast routes with a next hop on the device

	selected map[int]bool // filled by Select
}

func newNode(s Snapshot, opt Options) *node {
	n := &node{
		Options:  opt,
		patterns: parsePatterns(opt.Patterns),
		links:    slices.SortedFunc(slices.Values(s.Links), func(a, b Link) int { return a.Index - b.Index }),
		byID:     make(map[int]Link, len(s.Links)),
		addrs:    make(map[int][]Addr),
		routes:   s.Routes,
		via:      make(map[int][]Route),
		selected: make(map[int]bool),
	}
	for _, p := range opt.Sources {
		everything := 0
		if p.Addr().Is6() {
			everything = 7 // fc00::/7: all ULA sources of masquerade-forwarded (2.1)
		}
		if p.Bits() > everything {
			n.ranges = append(n.ranges, p.Masked())
		}
	}
	for _, l := range s.Links {
		n.byID[l.Index] = l
	}
	for _, a := range s.Addrs {
		n.addrs[a.Index] = append(n.addrs[a.Index], a)
	}
	for _, r := range s.Routes {
		if r.Type != Unicast {
			continue
		}
		var seen []int
		for _, h := range r.Hops {
			if !slices.Contains(seen, h.Index) {
				n.via[h.Index] = append(n.via[h.Index], r)
				seen = append(seen, h.Index)
			}
		}
	}
	return n
}

// inRange returns the source range that contains p.
func (n *node) inRange(p netip.Prefix) (netip.Prefix, bool) {
	for _, r := range n.ranges {
		if r.Bits() <= p.Bits() && r.Contains(p.Addr()) {
			return r, true
		}
	}
	return netip.Prefix{}, false
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
