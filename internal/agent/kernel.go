package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/policy"
)

// openDatapath opens the data plane, which a killed agent may hold for a moment yet.
func openDatapath(opt datapath.Options) (d *datapath.Datapath, err error) {
	linger(func() bool {
		d, err = datapath.Open(opt)
		return errors.Is(err, datapath.ErrBusy)
	})
	return d, err
}

const reservedPortsPath = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// reservedPorts reads ip_local_reserved_ports of the calling thread's network
// namespace. A kernel without it reserves none.
func reservedPorts() ([]config.PortRange, error) {
	// A line of 65536 ports is longer than any buffer of one read.
	data, err := os.ReadFile(reservedPortsPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ranges, err := config.ParseReservedPorts(string(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", reservedPortsPath, err)
	}
	return ranges, nil
}

// hasIPv6 tells whether the kernel has IPv6: not with ipv6.disable=1 either.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return !errors.Is(err, fs.ErrNotExist)
}

// earlier is what an agent before this one left in force.
type earlier struct {
	applied    bool // there is a policy in the kernel
	exclusions []netip.Prefix
	attached   []datapath.Attachment
	file       *PolicyFile // nil: none
}

// readEarlier reads what an earlier agent left, before the first apply. With an
// error it returns what could be read.
func readEarlier(inspect func() (inspector, error), runDir string) (e earlier, err error) {
	k, err := inspect()
	if isNone(err) {
		return e, nil
	}
	if err != nil {
		return e, err
	}
	defer k.Close()
	e.applied = k.Applied()
	if e.exclusions, err = k.Exclusions(); err != nil {
		return e, fmt.Errorf("read the policy in force: %w", err)
	}
	if e.attached, err = k.Attachments(); err != nil {
		return e, fmt.Errorf("read the policy in force: %w", err)
	}
	switch file, err := ReadPolicyFile(runDir); {
	case err == nil:
		e.file = &file
	case !errors.Is(err, fs.ErrNotExist):
		return e, err
	}
	return e, nil
}

// nonMasq is the ip-masq-agent list of the earlier agent. The kernel knows the
// prefixes, policy.json the origin of each and whether ip-masq-agent was on.
// Without policy.json a list can only be of ip-masq-agent, but an empty one may as
// well mean that it was off.
func (e earlier) nonMasq() ([]policy.Rule, bool) {
	switch {
	case !e.applied, e.file == nil && len(e.exclusions) == 0, e.file != nil && !e.file.IPMasqAgent.Enabled:
		return nil, false
	}
	origins := make(map[netip.Prefix]string)
	if e.file != nil {
		for _, r := range e.file.NonMasq {
			origins[r.Prefix] = r.Origin
		}
	}
	rules := make([]policy.Rule, len(e.exclusions))
	for i, p := range e.exclusions {
		rules[i] = policy.Rule{Prefix: p, Origin: orDefault(origins[p], "pinned")}
	}
	return rules, true
}

// nodes are those that the earlier agent had read from the nodes-file at path.
func (e earlier) nodes(path string) []policy.NodeAddr {
	var nodes []policy.NodeAddr
	if e.file != nil {
		for _, n := range e.file.Nodes {
			if n.Origin == "file "+path {
				nodes = append(nodes, n)
			}
		}
	}
	return nodes
}

// draining is what was left of another mode; nil: nothing.
func (e earlier) draining() *DrainingStatus {
	if e.file == nil {
		return nil
	}
	return e.file.Draining
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
