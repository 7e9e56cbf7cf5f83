package agent

import (
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// PolicyFile is policy.json: the policy in force with the origin of each part, so
// that readers work while the agent is down.
type PolicyFile struct {
	Format  int       `json:"format"` // policyFormat
	Written time.Time `json:"written"`
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Mode    string    `json:"mode"` // ModeBPF or ModeIPTables

	IPv4             bool                    `json:"ipv4"`
	IPv6             bool                    `json:"ipv6"`
	Sources          []policy.Rule           `json:"sources"`
	Native           []policy.Rule           `json:"native"`
	NonMasq          []policy.Rule           `json:"nonMasq"`
	Pods             []policy.Rule           `json:"pods"`
	Nodes            []policy.NodeAddr       `json:"nodes"`
	RemoteNodes      policy.RemoteNodes      `json:"remoteNodes"`
	UnknownProtocols policy.UnknownProtocols `json:"unknownProtocols"`
	HostAddrs        []netip.Addr            `json:"hostAddrs"`
	Devices          []policy.Device         `json:"devices"`
	RouteSources     []policy.RouteSource    `json:"routeSources,omitempty"`
	Ports            string                  `json:"ports"` // ranges
	Timeouts         policy.Timeouts         `json:"timeouts"`

	IPMasqAgent IPMasqStatus `json:"ipMasqAgent"` // without Rules: those are NonMasq
}

// ReadPolicyFile reads policy.json of a run directory. A missing one is fs.ErrNotExist.
func ReadPolicyFile(runDir string) (PolicyFile, error) {
	panic("not yet")
}

// Policy builds the policy that the file describes, for the decisions of readers.
func (f PolicyFile) Policy() (*policy.Policy, error) {
	panic("not yet")
}
