package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// Reader reads what a data plane holds, of either mode, with an agent or without.
type Reader interface {
	Exclusions() ([]netip.Prefix, error) // of the ip-masq-agent list
	NodeAddrs() ([]netip.Addr, error)
	Mappings(datapath.Filter) ([]datapath.Mapping, error)
	Flush(datapath.Filter) (int, error)
	Close() error
}

// Inspect opens the data plane of this network namespace for reading. Which mode it is of
// policy.json says, or else what there is. datapath.ErrNone: there is none. Empty
// arguments mean the default places.
func Inspect(ctx context.Context, bpfRoot, runDir string) (Reader, error) {
	bpfRoot, runDir = orDefault(bpfRoot, DefaultBPFRoot), orDefault(runDir, DefaultRunDir)
	k, err := inspectNode(ctx, bpfRoot, runDir)
	if err != nil {
		return nil, err
	}
	file, err := ReadPolicyFile(runDir)
	if err != nil || file.Draining == nil {
		return k.(Reader), nil
	}
	old, err := inspectRoot(bpfRoot)
	if file.Draining.Mode == ModeIPTables {
		old, err = inspectRules(ctx, &file)
	}
	if err != nil {
		return k.(Reader), nil // it is gone by now
	}
	return changing{k.(Reader), old.(Reader)}, nil
}

// changing reads both data planes while the connections of one drain: lists are of the one
// in force, but connections are in both.
type changing struct {
	Reader
	old Reader
}

func (c changing) Mappings(by datapath.Filter) ([]datapath.Mapping, error) {
	list, err := c.Reader.Mappings(by)
	if err != nil {
		return nil, err
	}
	rest, err := c.old.Mappings(by)
	return append(list, rest...), err
}

func (c changing) Flush(by datapath.Filter) (int, error) {
	n, err := c.Reader.Flush(by)
	if err != nil {
		return n, err
	}
	m, err := c.old.Flush(by)
	return n + m, err
}

func (c changing) Close() error { return errors.Join(c.Reader.Close(), c.old.Close()) }

// inspectNode opens the data plane of the mode that policy.json names; if there is none,
// that of the other.
func inspectNode(ctx context.Context, root, runDir string) (inspector, error) {
	file, fileErr := ReadPolicyFile(runDir)
	known := &file
	if fileErr != nil {
		known = nil
	}
	rules := func() (inspector, error) { return inspectRules(ctx, known) }
	programs := func() (inspector, error) { return inspectRoot(root) }
	if known != nil && known.Mode == ModeIPTables {
		k, err := rules()
		if isNone(err) {
			return either(programs, err)
		}
		return k, err
	}
	k, err := programs()
	if isNone(err) {
		return either(rules, err)
	}
	return k, err
}

// either opens the other mode's data plane. If that can't be looked for, here or as this
// user, the first answer, that there is none, stays.
func either(open func() (inspector, error), none error) (inspector, error) {
	k, err := open()
	switch {
	case err == nil:
		return k, nil
	case isNone(err), errors.Is(err, iptables.ErrNoBinary), errors.Is(err, fs.ErrPermission), os.Geteuid() != 0:
		return nil, none
	}
	return nil, err
}

// inspectRoot opens the data plane of eBPF mode below root; datapath.ErrNone: there is none.
func inspectRoot(root string) (inspector, error) {
	k, err := datapath.Inspect(root)
	if err != nil {
		return nil, err // not a nil pointer in an interface
	}
	return k, nil
}

// ruleInspector reads the rules of iptables mode in the kernel, and what conntrack knows.
type ruleInspector struct {
	*iptables.Inspector
	flowLists
}

// inspectRules opens the rules of this network namespace; iptables.ErrNone: there are none.
// file is the policy that is known to be in force, or nil.
func inspectRules(ctx context.Context, file *PolicyFile) (inspector, error) {
	k, err := iptables.Inspect(ctx, iptables.Options{})
	if err != nil {
		return nil, err
	}
	return &ruleInspector{Inspector: k, flowLists: newFlowLists(ctx, file)}, nil
}

// Attachments are the devices that the rules name, as far as they are there.
func (r *ruleInspector) Attachments() ([]datapath.Attachment, error) {
	names, err := r.Devices()
	if err != nil {
		return nil, err
	}
	var list []datapath.Attachment
	for _, name := range names {
		if dev, err := net.InterfaceByName(name); err == nil {
			list = append(list, datapath.Attachment{Device: name, Index: dev.Index, Hook: HookIPTables})
		}
	}
	return list, nil
}

// Applied tells whether the rules translate new flows.
func (r *ruleInspector) Applied() bool { return !r.Draining() }

// Tier names the backend: in this mode nothing else of the kernel makes a difference.
func (r *ruleInspector) Tier() string { return "iptables-" + string(r.Backend()) }

// Drops are what rules have counted.
func (r *ruleInspector) Drops() (map[string]uint64, error) {
	return r.Inspector.Drops(r.ctx, iptables.Options{})
}

const (
	conntrackCountPath = "/proc/sys/net/netfilter/nf_conntrack_count"
	conntrackMaxPath   = "/proc/sys/net/netfilter/nf_conntrack_max"
)

// Conntrack is how full netfilter's table of connections is: it has those of the whole
// network namespace.
func (r *ruleInspector) Conntrack() (u ConntrackUsage, err error) {
	for path, to := range map[string]*int{conntrackCountPath: &u.Entries, conntrackMaxPath: &u.Limit} {
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return ConntrackUsage{}, nil // no flow yet that netfilter looked at
		}
		if err == nil {
			*to, err = strconv.Atoi(strings.TrimSpace(string(data)))
		}
		if err != nil {
			return u, fmt.Errorf("%s: %w", path, err)
		}
	}
	return u, nil
}

// RemoveRules takes the rules, chains and sets of iptables mode away, of both backends. It
// returns what it removed and what it could not look for, for people to read. ErrBusy: an
// agent owns them.
func RemoveRules(ctx context.Context) (removed, notes []string, err error) {
	lock, err := claimRules()
	if err != nil {
		return nil, nil, err
	}
	defer lock.Close()
	removed, err = iptables.Remove(ctx, iptables.Options{})
	return removed, unseen(ctx), err
}

// legacyTablesPaths list the tables of the legacy backend in this network namespace.
var legacyTablesPaths = []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"}

// unseen says which rules there may be that no program here can show.
func unseen(ctx context.Context) []string {
	lacks := func(b iptables.Backend) bool {
		_, err := iptables.Open(ctx, iptables.Options{Backend: b})
		return errors.Is(err, iptables.ErrNoBinary)
	}
	switch {
	case !lacks(iptables.Legacy):
		return nil
	case lacks(iptables.NFT):
		return []string{"iptables is not installed: rules of iptables mode were not looked for"}
	case slices.ContainsFunc(legacyTablesPaths, func(path string) bool { names, err := os.ReadFile(path); return err == nil && len(names) > 0 }):
		return []string{"iptables-legacy is not installed, but the kernel has tables of it: rules there were not looked for"}
	}
	return nil
}

// sourceRanges are the masquerade source ranges of a policy.
func sourceRanges(file *PolicyFile) []netip.Prefix {
	if file == nil {
		return nil
	}
	return prefixes(slices.DeleteFunc(slices.Clone(file.Sources), func(r policy.Rule) bool { return !r.Prefix.IsValid() }))
}
