// Package policy decides what to masquerade and why, as a pure function of values.
//
// Input is everything the decision depends on: options, the ip-masq-agent list,
// cluster nodes, devices and addresses. Build turns it into an immutable Policy.
// Decide answers for the first packet of a connection, line by line as the
// contract numbers them. The BPF maps are a rendering of the same Policy
// (Sources, Destinations), and one table of cases (policytest) proves that all
// renderings agree.
package policy

import (
	"cmp"
	"net/netip"
	"time"
)

// Rule is a prefix and where it came from: "option NAME", "file PATH",
// "node NAME" or "default".
type Rule struct {
	Prefix netip.Prefix `json:"prefix"`
	Origin string       `json:"origin"`
}

// NodeType is the kind of a node's address, by the names Kubernetes uses. All but
// ExternalIP count as internal.
type NodeType string

const (
	InternalIP NodeType = "InternalIP"
	ExternalIP NodeType = "ExternalIP"
	Hostname   NodeType = "Hostname"
)

// NodeAddr is an address of another node of the cluster.
type NodeAddr struct {
	Addr   netip.Addr `json:"address"`
	Node   string     `json:"node"`
	Type   NodeType   `json:"type"`
	Origin string     `json:"origin"`
}

// RemoteNodes says towards which addresses of other nodes pods are masqueraded.
type RemoteNodes string

const (
	RemoteNone     RemoteNodes = "none"
	RemoteExternal RemoteNodes = "external"
	RemoteAll      RemoteNodes = "all"
)

// UnknownProtocols says what happens to protocols without ports that line 10 applies to.
type UnknownProtocols string

const (
	UnknownMasquerade UnknownProtocols = "masquerade"
	UnknownDrop       UnknownProtocols = "drop"
	UnknownPass       UnknownProtocols = "pass"
)

// Device is a masquerade device. The zero Addr means that the family has no
// address to masquerade with there.
type Device struct {
	Name       string       `json:"name"`
	Index      int          `json:"index"`
	Ethernet   bool         `json:"ethernet"` // packets carry an Ethernet header
	IPv4       netip.Addr   `json:"ipv4"`
	IPv6       netip.Addr   `json:"ipv6"`
	Broadcasts []netip.Addr `json:"broadcasts,omitempty"` // directed broadcast addresses of its subnets
}

// Addr returns the masquerade address for the family of a.
func (d Device) Addr(is4 bool) netip.Addr {
	if is4 {
		return d.IPv4
	}
	return d.IPv6
}

// RouteSource is a route of the main table with the source address to use
// towards it. The zero Source means the address of the egress device; such a
// route still comes before a shorter one.
type RouteSource struct {
	Prefix netip.Prefix `json:"prefix"`
	Source netip.Addr   `json:"source"`
}

// Timeouts is the life of a mapping by protocol and state (RFC 4787, 5382, 5508, 7857).
type Timeouts struct {
	TCPSyn         time.Duration `json:"tcpSyn"`
	TCPEstablished time.Duration `json:"tcpEstablished"`
	TCPClosing     time.Duration `json:"tcpClosing"`
	UDP            time.Duration `json:"udp"`       // packets one way only
	UDPStream      time.Duration `json:"udpStream"` // answered
	ICMP           time.Duration `json:"icmp"`
	Other          time.Duration `json:"other"`
}

// withDefaults returns t with each zero field at its default.
func (t Timeouts) withDefaults() Timeouts {
	d := DefaultTimeouts
	return Timeouts{
		TCPSyn:         cmp.Or(t.TCPSyn, d.TCPSyn),
		TCPEstablished: cmp.Or(t.TCPEstablished, d.TCPEstablished),
		TCPClosing:     cmp.Or(t.TCPClosing, d.TCPClosing),
		UDP:            cmp.Or(t.UDP, d.UDP),
		UDPStream:      cmp.Or(t.UDPStream, d.UDPStream),
		ICMP:           cmp.Or(t.ICMP, d.ICMP),
		Other:          cmp.Or(t.Other, d.Other),
	}
}

// DefaultTimeouts are the values of the contract (2.3).
var DefaultTimeouts = Timeouts{
	TCPSyn:         240 * time.Second,
	TCPEstablished: 7440 * time.Second,
	TCPClosing:     240 * time.Second,
	UDP:            120 * time.Second,
	UDPStream:      300 * time.Second,
	ICMP:           60 * time.Second,
	Other:          600 * time.Second,
}

// Input is everything a policy depends on. The zero value of a field is its default.
type Input struct {
	IPv4, IPv6       bool         // masquerading is on for the family
	Sources          []Rule       // masquerade source ranges (2.1)
	HostAddrs        []netip.Addr // zones are ignored; the node's own addresses, without those of pod-side devices inside a source range
	Native           []Rule       // native-routing CIDRs (2.2)
	NonMasq          []Rule       // ip-masq-agent list (5)
	Pods             []Rule       // pod ranges of other nodes
	Nodes            []NodeAddr   // addresses of other nodes
	RemoteNodes      RemoteNodes  // zero: none
	UnknownProtocols UnknownProtocols
	Devices          []Device
	RouteSources     []RouteSource // zero: the device's address everywhere
	Ports            []uint16      // the external ports, ascending
	Timeouts         Timeouts
	MaxPortsPerPod   int // mappings of one source address; zero: any number
	NewFlowsPerPod   int // a second; zero: any number
}

// Policy is an immutable, checked Input with its rendering for look-ups.
type Policy struct {
	in           Input
	sources      []Source
	destinations []Destination
	routeSources []RouteSource
	srcIndex     index[int]
	routes       index[netip.Addr]
	lists        [lines]List
	byLine       [lines]func() index[Rule] // made when Decide asks first: who only renders needs none
}

// A line of the contract's table (section 2) that is decided by destination.
const (
	lineMulticast = iota
	lineNative
	lineNonMasq
	linePod
	lineNode
	lines
)

var lineOutcome = [lines]Outcome{PassMulticast, PassNative, PassNonMasq, PassPod, PassNode}

// List is what one line excludes. Prefixes may repeat and overlap.
type List struct {
	Outcome Outcome
	Rules   []Rule
}

// Listed says in which lists exactly this prefix stands.
type Listed uint8

const (
	ListedNonMasq Listed = 1 << iota
	ListedNode
	ListedNative
	ListedPod
)

// Destination is an entry of the longest-prefix table by destination. Outcome is
// what the whole table says about an address whose longest entry this is:
// Continue when only line 10 is left.
type Destination struct {
	Prefix  netip.Prefix
	Outcome Outcome
	Listed  Listed
}

// Source is an entry of the longest-prefix table by source: PassHost for an
// address of the node, Continue for a source range.
type Source struct {
	Prefix  netip.Prefix
	Outcome Outcome
}

// always is excluded in every policy (line 4).
var always = []netip.Prefix{
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("ff00::/8"),
}

var linkLocal6 = netip.MustParsePrefix("fe80::/10")
