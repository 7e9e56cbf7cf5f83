// Package datapath owns every BPF object: programs, maps, pins and attachments.
//
// Open loads the data plane, or takes over the one that an earlier agent left
// pinned, and replaces its programs. Apply makes the kernel follow a
// policy.Policy: as a whole, and atomically for packets. Close leaves everything
// running; only Remove takes it away. Inspect reads the pinned objects with or
// without an agent. Nobody outside sees an *ebpf.Map.
//
// Invariants: a flow table is never given up before its flows are in the next one, a
// program is replaced in place, and the policy in force stays until a complete new one is
// written.
package datapath

import (
	"log/slog"
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// Options says where the data plane lives and how large it is.
type Options struct {
	Root  string // directory on a bpffs; its own, mode 0700
	Flows uint32 // flows a family, a power of two; 0: keep the tables there are, else DefaultFlows
	// DefaultFlows sizes new tables when Flows is 0.
	DefaultFlows uint32
	// Without names features to leave unused although the kernel has them.
	Without []Feature
	// AllowPrivateBPFFS lets Root be on a bpffs outside the host's mount namespace (labs).
	AllowPrivateBPFFS bool
	Sentinel          bool // attach the leak sentinel
	Log               *slog.Logger

	interrupt func(step string) error // tests only: see Datapath
	reclaim   *reclaimTiming          // tests only
}

// Hook is the kind of attachment.
type Hook string

const (
	HookTCX Hook = "tcx" // a pinned link, kernel 6.6
	HookTC  Hook = "tc"  // a clsact filter
)

// Attachment is a device with both programs on it.
type Attachment struct {
	Device string `json:"device"`
	Index  int    `json:"index"`
	Hook   Hook   `json:"hook"`
	// Draining: no masquerade device any more; known flows are still translated.
	Draining bool `json:"draining,omitempty"`
	// Ahead names tc programs that see leaving packets before ours.
	Ahead []string `json:"ahead,omitempty"`
	// Sentinel: the leak sentinel watches it.
	Sentinel bool `json:"sentinel,omitempty"`
}

// Count is a counter of the data plane since its maps were made.
type Count struct {
	Outcome policy.Outcome
	Ingress bool
	IPv6    bool
	Packets uint64
	Bytes   uint64
}

// Kind tells what an entry of the flow tables is.
type Kind string

const (
	KindMapping Kind = "mapping" // a masqueraded flow
	KindInbound Kind = "inbound" // a connection opened from outside
	KindHost    Kind = "host"    // a flow of the node itself
)

// Mapping is one entry of the flow tables, one direction of a flow.
type Mapping struct {
	Kind    Kind
	Proto   uint8          // IP protocol number
	Out     bool           // leaving: Src is the inner socket; else Src is the remote
	Src     netip.AddrPort // ICMP: the identifier stands as the port
	Dst     netip.AddrPort
	Xlate   netip.AddrPort // Out: the external socket; else the inner one
	Age     time.Duration  // since creation
	State   string         // syn, established, closing, one-way, two-way, query
	Packets uint32
	Bytes   uint64
}

// Filter selects entries; the zero Filter selects the mappings of pods.
type Filter struct {
	All    bool       // inbound and host entries too
	Pod    netip.Addr // inner address
	Remote netip.Addr // remote address
	Port   uint16     // remote port, with Remote
	Proto  uint8      // IP protocol number
}

// Usage is how full the tables of one family are.
type Usage struct {
	Flows        int `json:"flows"`
	Limit        int `json:"limit"`
	Inbound      int `json:"inbound"`
	InboundLimit int `json:"inboundLimit"`
	// Foreign are those of the flows that came here translated, by netfilter: their
	// ports are respected.
	Foreign int `json:"foreign,omitempty"`
}

// PortUse is the remote towards which most external ports are taken.
type PortUse struct {
	Proto  uint8
	Addr   netip.Addr     // masquerade address
	Remote netip.AddrPort // zero if there is no mapping
	Used   int
	Pool   int
}

// Swept is the result of one walk through the flow tables.
type Swept struct {
	Expired  int      // mappings and inbound entries past their timer
	Vanished int      // mappings whose external address has left the node
	Orphans  int      // halves without their other half
	Usage    [2]Usage // IPv4, IPv6
	// Protos counts the flows by IP protocol number, as the walk met them: also those that it ended.
	Protos [2]map[uint8]int
	Worst  PortUse
	Took   time.Duration

	generation uint64 // of the facts it began with
	oldest     uint32 // second in which the oldest mapping was made
}
