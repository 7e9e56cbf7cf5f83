package datapath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// Inspector reads the pinned data plane; it works with or without an agent.
type Inspector struct {
	root   string
	old    bool // the tables are of the previous layout: its policy and flows can be read, no more
	maps   map[string]*ebpf.Map
	tables [2]flowTables
}

// ErrNone says that there is no data plane below the root directory.
var ErrNone = errors.New("no data plane")

// Inspect opens the pinned objects below root. ErrNone: there are none.
func Inspect(root string) (*Inspector, error) {
	// Kernels before 5.11 charge the programs that a flush and the probes run to RLIMIT_MEMLOCK;
	// without the privilege to lift it, reading works all the same.
	_ = rlimit.RemoveMemlock()
	i := &Inspector{root: root, maps: make(map[string]*ebpf.Map)}
	layout, ok, err := readLayout(root)
	i.old = err == nil && ok && layout != mapLayout
	for _, name := range []string{pinControl, pinSettings, pinCounters, pinDevices, pinStats, pinRefusals, pinReclaim,
		pinForward4, pinForward6, pinReverse4, pinReverse6, pinInbound4, pinInbound6} {
		m, err := i.open(name)
		if errors.Is(err, ErrNone) && i.old && (name == pinStats || name == pinRefusals || name == pinReclaim) {
			continue
		}
		if errors.Is(err, ErrNone) && name != pinControl && pinned(root, pinControl) {
			// When all are removed, control goes first.
			err = advice.New(fmt.Errorf("%s: somebody removed it, other tables are there", filepath.Join(root, name)),
				"an agent in eBPF mode makes it anew when it starts", "or `bauta cleanup` first (running connections end)")
		}
		if err != nil {
			i.Close()
			return nil, err
		}
		i.maps[name] = m
	}
	i.tables = [2]flowTables{
		{i.maps[pinForward4], i.maps[pinReverse4], i.maps[pinInbound4], true},
		{i.maps[pinForward6], i.maps[pinReverse6], i.maps[pinInbound6], false},
	}
	return i, nil
}

func pinned(root, name string) bool {
	_, err := os.Lstat(filepath.Join(root, name))
	return err == nil
}

// open opens a pinned table. ErrNone: it is not there.
func (i *Inspector) open(name string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(i.root, name), nil)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return nil, advice.New(fmt.Errorf("%s: %w", i.root, ErrNone), "start it with `bauta agent`", "or name another --bpf-root")
	case errors.Is(err, os.ErrPermission):
		return nil, advice.New(fmt.Errorf("open %s: %w", filepath.Join(i.root, name), err), "run as root")
	case err != nil:
		return nil, fmt.Errorf("open pinned table %s: %w", name, err)
	}
	return m, nil
}

// Close lets go of the pinned objects.
func (i *Inspector) Close() error {
	var errs []error
	for _, m := range i.maps {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// active is the generation in force; false before the first Apply. The policy of the
// previous layout can be read too: an agent that upgrades starts from it.
func (i *Inspector) active() (generation uint32, ok bool, err error) {
	b, err := i.maps[pinControl].LookupBytes(uint32(0))
	if err != nil {
		return 0, false, fmt.Errorf("read control: %w", err)
	}
	layout, err := layoutOf(b)
	if err != nil {
		return 0, false, err
	}
	if layout != 0 && formats[layout] == nil {
		return 0, false, i.otherLayout(layout)
	}
	generation = binary.NativeEndian.Uint32(b) // state.active, in every version
	return generation, layout != 0 && generation != noGeneration, nil
}

func (i *Inspector) otherLayout(layout uint32) error {
	return advice.New(fmt.Errorf("%s: layout %d, this version reads %d", i.root, layout, mapLayout), "use the bauta of the running agent")
}

// Applied tells whether a policy is in force.
func (i *Inspector) Applied() bool {
	_, ok, err := i.active()
	return err == nil && ok
}

// Tier names what the running kernel offers, and what expires flows without an agent.
func (i *Inspector) Tier() string {
	f, err := Probe()
	if err != nil {
		return "unknown"
	}
	return f.Tier() + "; " + i.reclaimTier()
}

// destinations reads the table by destination of the policy in force.
func (i *Inspector) destinations(keep func(masqRule) bool) ([]netip.Prefix, error) {
	return i.prefixes(trieDestination, keep)
}

// prefixes reads a table of the policy in force.
func (i *Inspector) prefixes(which int, keep func(masqRule) bool) ([]netip.Prefix, error) {
	generation, ok, err := i.active()
	if err != nil || !ok {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(i.root, pinTrie(generation, which)), nil)
	if err != nil {
		return nil, fmt.Errorf("open policy table: %w", err)
	}
	defer m.Close()
	if have, want := m.ValueSize(), uint32(unsafe.Sizeof(masqRule{})); have != want {
		return nil, fmt.Errorf("policy table: rules of %d bytes, this version reads %d", have, want)
	}
	var out []netip.Prefix
	var key masqPrefix
	var rule masqRule
	it := m.Iterate()
	for it.Next(&key, &rule) {
		if keep(rule) {
			out = append(out, prefixFrom(key))
		}
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read policy table: %w", err)
	}
	slices.SortFunc(out, policy.ComparePrefixes)
	return out, nil
}

// setting reads the settings in force; nil if there are none that this version reads.
func (i *Inspector) setting() (*masqSetting, error) {
	generation, ok, err := i.active()
	if err != nil || !ok || i.old {
		return nil, err
	}
	s := new(masqSetting)
	if err := i.maps[pinSettings].Lookup(tableSet(generation), s); err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	return s, nil
}

// Exclusions returns the non-masquerade prefixes in the kernel, sorted, without
// those of a family that is off.
func (i *Inspector) Exclusions() ([]netip.Prefix, error) {
	ipv4, ipv6, err := i.Families()
	if err != nil {
		return nil, err
	}
	all, err := i.destinations(func(r masqRule) bool { return policy.Listed(r.Listed)&policy.ListedNonMasq != 0 })
	return slices.DeleteFunc(all, func(p netip.Prefix) bool {
		if p.Addr().Is4() {
			return !ipv4
		}
		return !ipv6
	}), err
}

// NodeAddrs returns the addresses of other nodes in the kernel, sorted.
func (i *Inspector) NodeAddrs() ([]netip.Addr, error) {
	all, err := i.destinations(func(r masqRule) bool { return policy.Listed(r.Listed)&policy.ListedNode != 0 })
	out := make([]netip.Addr, len(all))
	for n, p := range all {
		out[n] = p.Addr()
	}
	return out, err
}

// Families tells which families are masqueraded by the policy in force.
func (i *Inspector) Families() (ipv4, ipv6 bool, err error) {
	generation, ok, err := i.active()
	if err != nil || !ok {
		return false, false, err
	}
	b, err := i.maps[pinSettings].LookupBytes(tableSet(generation))
	if err != nil {
		return false, false, fmt.Errorf("read settings: %w", err)
	}
	at := binary.NativeEndian // setting.enabled comes first, in every version
	return at.Uint32(b) != 0, at.Uint32(b[4:]) != 0, nil
}

// Counts returns the non-zero counters, by outcome, direction and family.
func (i *Inspector) Counts() ([]Count, error) {
	var out []Count
	if i.old {
		return nil, nil // by other numbers
	}
	for slot := uint32(0); slot < policy.OutcomeSlots*4; slot++ {
		var perCPU []masqCounter
		if err := i.maps[pinCounters].Lookup(slot, &perCPU); err != nil {
			return nil, fmt.Errorf("read counters: %w", err)
		}
		c := Count{Outcome: policy.Outcome(slot / 4), Ingress: slot/2%2 == 1, IPv6: slot%2 == 1}
		for _, v := range perCPU {
			c.Packets += v.Packets
			c.Bytes += v.Bytes
		}
		if c.Packets > 0 {
			out = append(out, c)
		}
	}
	return out, nil
}

// Usage counts the flows of both families.
func (i *Inspector) Usage() ([2]Usage, error) {
	var out [2]Usage
	for n, t := range i.tables {
		u := &out[n]
		u.Limit, u.InboundLimit = int(t.forward.MaxEntries()), int(t.inbound.MaxEntries())
		for e, err := range t.all(t.forward) {
			if err != nil {
				return out, err
			}
			u.Flows++
			if e.foreign() {
				u.Foreign++
			}
		}
		for _, err := range t.allInbound() {
			if err != nil {
				return out, err
			}
			u.Inbound++
		}
	}
	return out, nil
}

// WorstPort finds the remote towards which most ports are taken.
func (i *Inspector) WorstPort() (PortUse, error) {
	s, err := i.setting()
	if err != nil || s == nil {
		return PortUse{}, err
	}
	tally := newPortTally(int(s.Ports), 0)
	for _, t := range i.tables {
		for e, err := range t.all(t.forward) {
			if err != nil {
				return PortUse{}, err
			}
			tally.add(e)
		}
	}
	return tally.worst(), nil
}

// Flush removes the mappings that f selects and returns their number.
func (i *Inspector) Flush(f Filter) (int, error) {
	prog, err := ebpf.LoadPinnedProgram(filepath.Join(i.root, pinReap), nil)
	if err != nil {
		return 0, fmt.Errorf("open the reaper: %w", err)
	}
	defer prog.Close()
	r := &reaper{prog: prog}
	for _, t := range i.tables {
		if err := t.flush(r, f); err != nil {
			return r.removed, err
		}
	}
	return r.removed, i.forgetRefusals()
}

// forgetRefusals lets everybody search again: there are free ports now.
func (i *Inspector) forgetRefusals() error {
	m := i.maps[pinRefusals]
	if i.old {
		return nil
	}
	var keys []masqRefused
	err := eachEntry(m, func(k masqRefused, _ masqRefusal) bool {
		keys = append(keys, k)
		return true
	})
	for _, k := range keys {
		if err == nil {
			err = m.Delete(k)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // evicted meanwhile
			err = nil
		}
	}
	if err != nil {
		return fmt.Errorf("forget refusals: %w", err)
	}
	return nil
}

func (t flowTables) flush(r *reaper, f Filter) error {
	ctx := context.Background()
	for e, err := range t.all(t.forward) {
		if err == nil && f.selects(e, e.host()) {
			err = r.add(ctx, masqReapRecord{Key: e.key.tuple(), Table: reapForward, Force: 1})
		}
		if err != nil {
			return err
		}
	}
	dead := reaper{prog: r.prog} // no mappings any more
	for e, err := range t.all(t.reverse) {
		if err == nil && e.dead() && f.selects(flowEntry{key: e.inner()}, false) {
			err = dead.add(ctx, masqReapRecord{Key: e.key.tuple(), Table: reapReverse, Force: 1})
		}
		if err != nil {
			return err
		}
	}
	if err := dead.flush(ctx); err != nil {
		return err
	}
	for e, err := range t.allInbound() {
		if err == nil && f.selects(e, true) {
			err = r.add(ctx, masqReapRecord{Key: e.key.tuple(), Table: reapInbound, Force: 1})
		}
		if err != nil {
			return err
		}
	}
	return r.flush(ctx)
}
