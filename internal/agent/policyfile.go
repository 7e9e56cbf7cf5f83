package agent

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/policy"
)

const (
	policyFileName = "policy.json"
	policyFormat   = 1
)

// PolicyFile is policy.json: the policy in force with the origin of each part, so
// that readers work while the agent is down.
type PolicyFile struct {
	Format  int       `json:"format"`
	Written time.Time `json:"written"`
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Mode    string    `json:"mode"`           // ModeBPF or ModeIPTables
	Node    string    `json:"node,omitempty"` // name of the Node object; empty: without Kubernetes

	State4           SourceState             `json:"ipv4"`
	State6           SourceState             `json:"ipv6"`
	Sources          []policy.Rule           `json:"sources"`
	Native           []policy.Rule           `json:"native"`
	NonMasq          []policy.Rule           `json:"nonMasq"`
	Pods             []policy.Rule           `json:"pods"`
	Nodes            []policy.NodeAddr       `json:"nodes"`
	RemoteNodes      policy.RemoteNodes      `json:"remoteNodes"`
	UnknownProtocols policy.UnknownProtocols `json:"unknownProtocols"`
	HostAddrs        []netip.Addr            `json:"hostAddrs"`
	Devices          []devices.Selected      `json:"devices"`
	RouteSources     []policy.RouteSource    `json:"routeSources,omitempty"`
	Ports            string                  `json:"ports"` // ranges, for example "32768-65535"
	Timeouts         policy.Timeouts         `json:"timeouts"`
	MaxPortsPerPod   int                     `json:"maxPortsPerPod"`
	NewFlowsPerPod   int                     `json:"newFlowsPerPod"`

	IPMasqAgent IPMasqStatus `json:"ipMasqAgent"` // its Rules are NonMasq
	NodesFile   NodesStatus  `json:"nodesFile"`

	Draining *DrainingStatus `json:"draining,omitempty"` // the other mode; nil: nothing of it is there
}

// newPolicyFile describes a policy; the caller adds who wrote it and the files.
func newPolicyFile(w wanted) PolicyFile {
	in := w.input
	return PolicyFile{
		Format: policyFormat, Mode: w.mode, State4: w.state4, State6: w.state6,
		Sources: in.Sources, Native: in.Native, NonMasq: in.NonMasq, Pods: in.Pods,
		Nodes: in.Nodes, RemoteNodes: in.RemoteNodes, UnknownProtocols: in.UnknownProtocols,
		HostAddrs: in.HostAddrs, Devices: w.selection.Devices, RouteSources: in.RouteSources,
		Ports: portRanges(in.Ports), Timeouts: in.Timeouts,
		MaxPortsPerPod: in.MaxPortsPerPod, NewFlowsPerPod: in.NewFlowsPerPod,
	}
}

// Policy builds the policy that the file describes, for the decisions of readers.
func (f PolicyFile) Policy() (*policy.Policy, error) {
	ports, err := f.ports()
	if err != nil {
		return nil, err
	}
	return policy.Build(policy.Input{
		IPv4: f.State4 != SourcesOff, IPv6: f.State6 != SourcesOff,
		Sources: f.Sources, HostAddrs: f.HostAddrs, Native: f.Native, NonMasq: f.NonMasq,
		Pods: f.Pods, Nodes: f.Nodes, RemoteNodes: f.RemoteNodes, UnknownProtocols: f.UnknownProtocols,
		Devices:      devices.Selection{Devices: f.Devices}.PolicyDevices(),
		RouteSources: f.RouteSources, Ports: ports, Timeouts: f.Timeouts,
		MaxPortsPerPod: f.MaxPortsPerPod, NewFlowsPerPod: f.NewFlowsPerPod,
	})
}

func (f PolicyFile) ports() ([]uint16, error) {
	ranges, err := config.ParseReservedPorts(f.Ports)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", policyFileName, err)
	}
	var ports []uint16
	for _, r := range ranges {
		for p := int(r.First); p <= int(r.Last); p++ {
			ports = append(ports, uint16(p))
		}
	}
	return ports, nil
}

// portRanges writes ascending ports as ranges.
func portRanges(ports []uint16) string {
	var ranges []string
	for i := 0; i < len(ports); {
		last := i
		for last+1 < len(ports) && ports[last+1] == ports[last]+1 {
			last++
		}
		ranges = append(ranges, config.PortRange{First: ports[i], Last: ports[last]}.String())
		i = last + 1
	}
	return strings.Join(ranges, ",")
}

// same tells whether two files say the same, whenever they were written.
func (f PolicyFile) same(g PolicyFile) bool {
	if !slices.Equal(f.NonMasq, g.NonMasq) || !slices.Equal(f.Pods, g.Pods) || !slices.Equal(f.Nodes, g.Nodes) { // with reflection it takes much longer
		return false
	}
	f.NonMasq, f.Pods, f.Nodes = nil, nil, nil
	g.NonMasq, g.Pods, g.Nodes = nil, nil, nil
	f.Written, g.Written = time.Time{}, time.Time{}
	return reflect.DeepEqual(f, g)
}

// ReadPolicyFile reads policy.json of a run directory. A missing one is fs.ErrNotExist.
func ReadPolicyFile(runDir string) (PolicyFile, error) {
	path := filepath.Join(orDefault(runDir, DefaultRunDir), policyFileName)
	data, err := os.ReadFile(path)
	if err != nil {
		return PolicyFile{}, err
	}
	var f PolicyFile
	if err := json.Unmarshal(data, &f); err != nil {
		return PolicyFile{}, fmt.Errorf("%s: %w", path, err)
	}
	if f.Format != policyFormat {
		return PolicyFile{}, fmt.Errorf("%s: format %d, expected %d (written by another version)", path, f.Format, policyFormat)
	}
	return f, nil
}

// addrs are those that flows may have.
func (f PolicyFile) addrs() []netip.Addr {
	return slices.DeleteFunc(ownAddrs(policy.Input{
		HostAddrs: f.HostAddrs, RouteSources: f.RouteSources,
		Devices: devices.Selection{Devices: f.Devices}.PolicyDevices(),
	}), func(a netip.Addr) bool { return !a.IsValid() })
}

// write replaces policy.json: a reader sees the old one or the new one, whole.
// It is not synced to disk: the run directory does not survive a reboot, and
// neither does what the file describes.
func (f PolicyFile) write(runDir string) error {
	data, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("%s: %w", policyFileName, err)
	}
	tmp, err := os.CreateTemp(runDir, "."+policyFileName+".") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", policyFileName, err)
	}
	_, err = tmp.Write(append(data, '\n'))
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(runDir, policyFileName))
	}
	if err != nil {
		os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", policyFileName, err)
	}
	return nil
}
