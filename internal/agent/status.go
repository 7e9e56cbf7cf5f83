package agent

import (
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// Status is what is running. Its JSON form is that of `bauta status -o json`.
type Status struct {
	Masquerading Masquerading      `json:"masquerading"`
	Agent        AgentStatus       `json:"agent"`
	Datapath     DatapathStatus    `json:"datapath"`
	Devices      []DeviceStatus    `json:"devices"` // by name
	Sources      Sources           `json:"sources"`
	IPMasqAgent  IPMasqStatus      `json:"ipMasqAgent"`
	Nodes        NodesStatus       `json:"nodes"`
	Kubernetes   *KubernetesStatus `json:"kubernetes,omitempty"` // of the running agent, with enable-k8s
	Flows        Flows             `json:"flows"`
	Ports        PortsStatus       `json:"ports"`
	Leaks        LeaksStatus       `json:"leaks"`
	Drops        map[string]uint64 `json:"drops"` // packets by reason name, no zeroes
	Warnings     []string          `json:"warnings"`
	Draining     *DrainingStatus   `json:"draining,omitempty"` // after a change of mode
}

// DrainingStatus is what is left of the other mode after a change: connections that could not be
// moved, and end there.
type DrainingStatus struct {
	Mode        string    `json:"mode"`
	Connections int       `json:"connections"`
	Since       time.Time `json:"since"`
	// Addresses are those of rules that were taken over and gave others than we do.
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// Modes of masquerading, by the names of Cilium.
const (
	ModeBPF      = "BPF"
	ModeIPTables = "iptables"
)

// Masquerading has the names and values of Cilium's status.
type Masquerading struct {
	Enabled             bool             `json:"enabled"`
	EnabledProtocols    EnabledProtocols `json:"enabledProtocols"`
	Mode                string           `json:"mode"`
	IPMasqAgent         bool             `json:"ip-masq-agent"`
	SNATExclusionCIDRv4 string           `json:"snat-exclusion-cidr-v4"` // blank-separated
	SNATExclusionCIDRv6 string           `json:"snat-exclusion-cidr-v6"`
}

// EnabledProtocols says which families are masqueraded.
type EnabledProtocols struct {
	IPv4 bool `json:"ipv4"`
	IPv6 bool `json:"ipv6"`
}

// AgentState tells whether the agent that wrote the rest is there.
type AgentState string

const (
	Running AgentState = "running"
	Down    AgentState = "down"
)

// AgentStatus is about the process. With the agent down it is that of the last one.
type AgentStatus struct {
	State         AgentState `json:"state"`
	PID           int        `json:"pid,omitempty"`
	Version       string     `json:"version,omitempty"`
	Started       time.Time  `json:"started,omitzero"`
	UptimeSeconds int64      `json:"uptimeSeconds,omitempty"` // only when running
	Ready         bool       `json:"ready"`                   // a policy of this agent is in force, on at least one device if it has any
	LastApply     time.Time  `json:"lastApply,omitzero"`
	// Waiting is what a policy can't be made without yet.
	Waiting string `json:"waiting,omitempty"`
	// ConfigError is why a restart would not accept the option files as they are now.
	ConfigError string `json:"configError,omitempty"`
	// Error is why the wanted policy is not in force; it is being retried.
	Error string `json:"error,omitempty"`
	// AttachError is why the policy in force is not so on every device; it is being retried.
	AttachError string `json:"attachError,omitempty"`
	// HTTPError is why prometheus-serve-addr does not answer; it is being retried.
	HTTPError string `json:"httpError,omitempty"`
}

// DatapathStatus is about the objects in the kernel.
type DatapathStatus struct {
	Present bool   `json:"present"`
	Applied bool   `json:"applied"` // holds a complete policy
	Tier    string `json:"tier,omitempty"`
}

// DeviceState is what a device of the status is.
type DeviceState string

const (
	DeviceAttached DeviceState = "attached"
	DeviceDraining DeviceState = "draining"     // no masquerade device any more; known flows are still translated
	DeviceMissing  DeviceState = "missing"      // named in the configuration, not on the node
	DevicePending  DeviceState = "not attached" // should be
)

// DeviceStatus is a masquerade device, or one that should be.
type DeviceStatus struct {
	Name   string        `json:"name"`
	Index  int           `json:"index,omitempty"`
	State  DeviceState   `json:"state"`
	Hook   datapath.Hook `json:"hook,omitempty"`
	IPv4   netip.Addr    `json:"ipv4"`
	IPv6   netip.Addr    `json:"ipv6"`
	Reason string        `json:"reason,omitempty"` // why it is a masquerade device
	Why4   string        `json:"why4,omitempty"`   // why it has this address, or none
	Why6   string        `json:"why6,omitempty"`
	Ahead  []string      `json:"ahead,omitempty"` // tc programs that see leaving packets before ours
}

// SourceState says whether a family masquerades anything.
type SourceState string

const (
	SourcesUsed   SourceState = "used"
	SourcesUnused SourceState = "unused" // no source range, or with masquerade-forwarded no default route
	SourcesOff    SourceState = "off"    // masquerading is off for the family
)

// Sources are the masquerade source ranges by family.
type Sources struct {
	IPv4 FamilySources `json:"ipv4"`
	IPv6 FamilySources `json:"ipv6"`
}

// FamilySources are the source ranges of one family.
type FamilySources struct {
	State  SourceState   `json:"state"`
	Ranges []policy.Rule `json:"ranges"`
}

// IPMasqOrigin says where the ip-masq-agent list in force came from.
type IPMasqOrigin string

const (
	FromFile     IPMasqOrigin = "file"      // what is there now
	FromLastGood IPMasqOrigin = "last good" // what was there before it went bad
	FromPinned   IPMasqOrigin = "pinned"    // what an earlier agent had left in the kernel
	FromDefaults IPMasqOrigin = "defaults"  // nothing else was to be had
)

// IPMasqStatus is the ip-masq-agent list in force.
type IPMasqStatus struct {
	Enabled    bool          `json:"enabled"`
	Path       string        `json:"path,omitempty"`
	Profile    string        `json:"profile,omitempty"`
	State      string        `json:"state,omitempty"` // of the file: see ipmasq.State
	InForce    IPMasqOrigin  `json:"inForce,omitempty"`
	Files      []string      `json:"files,omitempty"`
	Prefixes   int           `json:"prefixes"`
	Rules      []policy.Rule `json:"rules,omitempty"` // the prefixes with the file each came from
	LastReload time.Time     `json:"lastReload,omitzero"`
	LastError  string        `json:"lastError,omitempty"` // empty after a good reload
	Warnings   []string      `json:"warnings,omitempty"`
}

// NodesStatus is what is known of the other nodes of the cluster.
type NodesStatus struct {
	Known      int       `json:"known"` // nodes; an address without a name counts as one
	Addresses  int       `json:"addresses"`
	File       string    `json:"file,omitempty"`
	LastReload time.Time `json:"lastReload,omitzero"`
	LastError  string    `json:"lastError,omitempty"`
}

// KubernetesStatus is what goes on with the API server.
type KubernetesStatus struct {
	Node       string    `json:"node"`              // name of the Node object of this node
	Synced     bool      `json:"synced"`            // a complete list was read since the start
	Nodes      int       `json:"nodes"`             // Node objects, with this one
	LastSync   time.Time `json:"lastSync,omitzero"` // when the API server last confirmed what is known
	Error      string    `json:"error,omitempty"`   // why it can't be asked now
	ErrorSince time.Time `json:"errorSince,omitzero"`
	EventsLost uint64    `json:"eventsLost,omitempty"` // Events about this node that could not be sent
	Problem    string    `json:"problem,omitempty"`    // what is wrong with the Node object of this node
}

// Flows is how full the flow tables are.
type Flows struct {
	IPv4 datapath.Usage `json:"ipv4,omitzero"` // eBPF mode only, as IPv6
	IPv6 datapath.Usage `json:"ipv6,omitzero"`
	// Conntrack is netfilter's table, in iptables mode.
	Conntrack *ConntrackUsage `json:"conntrack,omitempty"`
}

// ConntrackUsage is how full netfilter's table of connections is. It has all those of the
// network namespace, masqueraded or not.
type ConntrackUsage struct {
	Entries int `json:"entries"`
	Limit   int `json:"limit"`
}

// PortsStatus is about external ports.
type PortsStatus struct {
	Ranges string     `json:"ranges"` // for example "32768-65535"
	Pool   int        `json:"pool"`   // number of ports in them
	Worst  *WorstPort `json:"worst,omitempty"`
	// Searches is how the searches for ports went; absent without a data plane.
	Searches *datapath.PortSearches `json:"searches,omitempty"`
	Error    string                 `json:"error,omitempty"` // why these ports are in use although they should not be
}

// LeaksStatus is what the leak sentinel saw.
type LeaksStatus struct {
	Sentinel bool         `json:"sentinel"` // watches every attached device
	Packets  uint64       `json:"packets"`  // of all devices
	Devices  []LeakStatus `json:"devices"`  // sums
	Samples  []LeakStatus `json:"samples"`  // the newest, the last first
}

// LeakStatus is about packets that left with a source that should have been masqueraded.
type LeakStatus struct {
	Device       string     `json:"device"`
	Source       netip.Addr `json:"source,omitzero"`
	Destination  netip.Addr `json:"destination,omitzero"`
	Proto        uint8      `json:"proto,omitempty"` // IP protocol number
	Packets      uint64     `json:"packets"`
	FirstSeconds int64      `json:"firstSeconds"` // ago
	LastSeconds  int64      `json:"lastSeconds"`
}

// leakAlarm is how long after the last leak the status is degraded.
const leakAlarm = 600

// WorstPort is the remote towards which most external ports are taken.
type WorstPort struct {
	Proto   uint8          `json:"proto"` // IP protocol number
	Address netip.Addr     `json:"address"`
	Remote  netip.AddrPort `json:"remote"`
	Used    int            `json:"used"`
	Pool    int            `json:"pool"`
}
