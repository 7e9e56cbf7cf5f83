package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"bauta.dev/bauta/internal/config"
	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/devices"
	"bauta.dev/bauta/internal/iptables"
	"bauta.dev/bauta/internal/policy"
)

// HookIPTables is the hook of a device that rules masquerade on.
const HookIPTables datapath.Hook = "iptables"

// ruleSet is what iptables mode needs of iptables.Tables.
type ruleSet interface {
	Apply(context.Context, *policy.Policy) error
	Check(context.Context) (changed string, err error)
	Drain(context.Context) error
	Warnings() []string
	Held(context.Context, *policy.Policy) (bool, error) // before the first Apply
	Changed() string                                    // by others, before the last Apply
}

// checkPause is from one look at the rules to the next: somebody else's flush is healed
// within 5 s. With many rules a look takes long; looks take a quarter of the time at most.
const checkPause, checkShare = 2 * time.Second, 4

// netfilter is the data plane of iptables mode.
type netfilter struct {
	rules ruleSet
	lock  io.Closer
	log   *slog.Logger
	flows func(context.Context, conntrack.Filter) ([]conntrack.Flow, error)
	end   func(context.Context, []conntrack.Flow) (int, error)

	checked  time.Time     // when the last look began
	took     time.Duration // how long it took
	attached []datapath.Attachment
	unrest   unrest
	noted    bool // what the next Apply finds changed

	leave    func([]netip.Addr) (map[netip.Addr]int, error)  // by which device packets leave
	spare    func(context.Context) (map[flowKey]bool, error) // connections that others translate; nil: none
	before   *policy.Policy                                  // what an earlier agent had in force; nil: not known
	policy   *policy.Policy                                  // in force by this agent; nil: none yet
	renewing bool                                            // rules were not in force: see renew

	mu      sync.Mutex
	sources []netip.Prefix
	had     map[netip.Addr]bool // addresses that flows may have; false: no longer on the node
}

// openNetfilter finds the binaries and takes possession of the rules of this network
// namespace. It changes nothing in the kernel. The zero backend is to be detected.
func openNetfilter(ctx context.Context, cfg config.Config, backend iptables.Backend, log *slog.Logger) (*netfilter, error) {
	lock, err := claimRules()
	if err != nil {
		return nil, err
	}
	tables, err := iptables.Open(ctx, iptables.Options{Backend: backend, LockTimeout: cfg.IPTablesLockTimeout, RandomFully: cfg.IPTablesRandomFully, Log: log})
	if err != nil {
		lock.Close()
		return nil, err
	}
	return &netfilter{rules: tables, lock: lock, log: log, unrest: unrest{log: log}, flows: conntrack.List, end: conntrack.Delete, leave: devices.Leave, had: make(map[netip.Addr]bool)}, nil
}

// expect says what an earlier agent left: addresses that flows may have, and its policy.
func (n *netfilter) expect(file PolicyFile) {
	for _, a := range file.addrs() {
		n.had[a] = false
	}
	if p, err := file.Policy(); err == nil && file.Mode == ModeIPTables {
		n.before = p
	}
}

func (n *netfilter) Close() error { return n.lock.Close() }

func (n *netfilter) Warnings() []string { return append(n.rules.Warnings(), n.unrest.warnings()...) }

// Apply also ends connections that began while rules were not in force. A policy that is
// just another one ends none.
func (n *netfilter) Apply(ctx context.Context, p *policy.Policy) error {
	err := n.write(ctx, p)
	if err != nil && !partly(err) {
		return err
	}
	return errors.Join(err, n.renew(ctx))
}

// write puts rules in force, and notes whether they were not until now.
func (n *netfilter) write(ctx context.Context, p *policy.Policy) error {
	if n.policy == nil && !n.held(ctx, p) {
		n.renewing = true
	}
	err := n.rules.Apply(ctx, p)
	if changed := n.rules.Changed(); changed != "" {
		n.renewing = true
		if !n.noted {
			n.unrest.note(changed)
		}
	}
	n.noted = false
	if err != nil && !partly(err) {
		return err
	}
	n.checked = time.Now()
	in := p.Input()
	if n.policy != nil && !slices.Equal(deviceNames(n.policy.Input().Devices), deviceNames(in.Devices)) {
		n.renewing = true // rules name devices: one with a new name had none
	}
	n.policy, n.before = p, nil
	n.attached = nil
	for _, d := range in.Devices {
		if iptables.CheckDevice(d.Name) != nil {
			continue // the rules leave it out, and the error says so
		}
		n.attached = append(n.attached, datapath.Attachment{Device: d.Name, Index: d.Index, Hook: HookIPTables})
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sources = prefixes(in.Sources)
	for a := range n.had {
		n.had[a] = false
	}
	for _, a := range ownAddrs(in) {
		if a.IsValid() {
			n.had[a] = true
		}
	}
	return err
}

func (n *netfilter) Attached() []datapath.Attachment { return slices.Clone(n.attached) }

// Healthy compares the rules in the kernel with those applied, every checkPause. What
// can't be compared is applied again: then the error shows.
func (n *netfilter) Healthy(ctx context.Context) bool {
	if time.Since(n.checked) < max(checkPause, checkShare*n.took) {
		return true
	}
	n.checked = time.Now()
	changed, err := n.rules.Check(ctx)
	n.took = time.Since(n.checked)
	switch {
	case ctx.Err() != nil:
		return true
	case err != nil:
		n.unrest.note(fmt.Sprintf("not to be compared: %v", err))
		n.noted = true
	case changed != "":
		n.renewing, n.noted = true, true
		n.unrest.note(changed)
	}
	return err == nil && changed == ""
}

// Walk ends the flows that were translated to an address that has left the node: netfilter
// would keep them. It runs in another goroutine than Apply.
func (n *netfilter) Walk(ctx context.Context) (datapath.Swept, error) {
	start := time.Now()
	sources, gone := n.gone()
	if len(gone) == 0 {
		return datapath.Swept{}, nil
	}
	flows, err := n.flows(ctx, conntrack.Filter{Sources: sources, Translated: true, AnyZone: true})
	if err != nil {
		return datapath.Swept{}, fmt.Errorf("list flows: %w", err)
	}
	flows = slices.DeleteFunc(flows, func(f conntrack.Flow) bool {
		return !f.SNAT || !gone[f.Xlate.Addr()] || !within(sources, f.Src.Addr())
	})
	ended, err := n.end(ctx, flows)
	if err != nil {
		return datapath.Swept{}, fmt.Errorf("end flows of an address that has left: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for a := range gone {
		if !n.had[a] { // it has not come back in between
			delete(n.had, a)
		}
	}
	return datapath.Swept{Vanished: ended, Took: time.Since(start)}, nil
}

// gone are the addresses that flows may have and the node has no longer.
func (n *netfilter) gone() (sources []netip.Prefix, gone map[netip.Addr]bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	gone = make(map[netip.Addr]bool)
	for a, here := range n.had {
		if !here {
			gone[a] = true
		}
	}
	return n.sources, gone
}

func within(ranges []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
}
