package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// ErrAttach says that a policy is in force, but a device could not be attached.
var ErrAttach = errors.New("device not attached")

// applied is what the kernel holds of the last policy.
type applied struct {
	policy  *policy.Policy
	removed []removal
	rows    [tries][]trieEntry // by trieSource, trieDestination, trieRoute, trieRemoved
	tries   [tries]*ebpf.Map
}

func (a *applied) close() {
	for _, m := range a.tries {
		m.Close()
	}
}

const (
	trieSource = iota
	trieDestination
	trieRoute
	trieRemoved
	tries
)

// trieEntry is one row of a longest-prefix table.
type trieEntry struct {
	key   masqPrefix
	value masqRule
}

// ipv4Root keeps IPv6 entries such as ::/0 from matching v4-mapped addresses:
// both families share a trie.
var ipv4Root = masqPrefix{Length: 96, Addr: addrTo(netip.IPv4Unspecified())}

// renderTries turns the tables of a policy, and what it removed, into rows.
func renderTries(p *policy.Policy, removed []removal) [tries][]trieEntry {
	var rows [tries][]trieEntry
	for _, s := range p.Sources() {
		rows[trieSource] = append(rows[trieSource], trieEntry{prefixTo(s.Prefix), masqRule{Outcome: uint8(s.Outcome)}})
	}
	for _, d := range p.Destinations() {
		rows[trieDestination] = append(rows[trieDestination],
			trieEntry{prefixTo(d.Prefix), masqRule{Outcome: uint8(d.Outcome), Listed: uint8(d.Listed)}})
	}
	index := make(map[netip.Addr]uint16)
	for i, a := range routeSources(p) {
		index[a] = uint16(i + 1)
	}
	for _, r := range p.RouteSources() {
		rows[trieRoute] = append(rows[trieRoute], trieEntry{prefixTo(r.Prefix), masqRule{Source: index[r.Source]}})
	}
	for _, r := range removed {
		rows[trieRemoved] = append(rows[trieRemoved], trieEntry{prefixTo(r.prefix), masqRule{Outcome: uint8(policy.PassNonMasq)}})
	}
	for i, rest := range [tries]policy.Outcome{trieSource: policy.PassSource} {
		if !slices.ContainsFunc(rows[i], func(e trieEntry) bool { return e.key == ipv4Root }) {
			rows[i] = append(rows[i], trieEntry{ipv4Root, masqRule{Outcome: uint8(rest)}})
		}
	}
	return rows
}

// Apply makes the kernel follow p. Packets see the old policy or the new one,
// never a mixture: the idle tables are written first, then one number changes. When it returns, no packet is under way with the old policy.
// On an error the old policy stays in force, and a later Apply starts over.
// Devices are attached last, when there is a policy for them: ErrAttach says that
// the policy is in force, but not on each of its devices.
func (d *Datapath) Apply(ctx context.Context, p *policy.Policy) error {
	d.sweeper.expect(p.Input())
	next, err := d.writePolicy(ctx, p)
	if err != nil {
		return err
	}
	if d.applied != nil {
		d.releaseTries(d.applied, next)
	}
	d.applied = next
	if !d.taken {
		// A device without an entry passes new flows: it has one before it has our programs.
		for _, dev := range p.Input().Devices {
			if err := d.putDevice(dev); err != nil {
				return err
			}
		}
		if err := d.takeOver(); err != nil {
			return err
		}
	}
	err = d.applyDevices(p.Input().Devices)
	d.applies++
	d.sweeper.facts.Store(renderFacts(p.Input(), d.applies))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAttach, err)
	}
	return nil
}

// writePolicy writes p into the idle tables and puts them in force as the next generation.
func (d *Datapath) writePolicy(ctx context.Context, p *policy.Policy) (*applied, error) {
	next, generation, err := d.prepare(ctx, p)
	if err != nil {
		return nil, err
	}
	if err := d.flip(generation, next); err != nil {
		d.releaseNew(next)
		return nil, err
	}
	if err := d.awaitReaders(generation, next); err != nil {
		d.releaseNew(next)
		return nil, err
	}
	return next, nil
}

func (d *Datapath) releaseTries(old, next *applied) {
	for i, m := range old.tries {
		if m != next.tries[i] {
			m.Close()
		}
	}
}

// prepare makes the tables of p that differ from those in force, and returns the
// number of the next generation.
func (d *Datapath) prepare(ctx context.Context, p *policy.Policy) (next *applied, generation uint32, err error) {
	st, err := d.state()
	if err != nil {
		return nil, 0, err
	}
	removed, err := d.removals(p, st.Active)
	if err != nil {
		return nil, 0, err
	}
	next = &applied{policy: p, removed: removed, rows: renderTries(p, removed)}
	for i, rows := range next.rows {
		if d.applied != nil && slices.Equal(rows, d.applied.rows[i]) {
			next.tries[i] = d.applied.tries[i]
			continue
		}
		if next.tries[i], err = d.newTrie(ctx, i, rows); err != nil {
			d.releaseNew(next)
			return nil, 0, err
		}
	}
	return next, st.Active + 1, nil // noGeneration is followed by 0
}

// flip writes the idle tables and makes them the active ones, by a number that was
// never used before: what the programs remember of the old tables is void with it.
func (d *Datapath) flip(generation uint32, next *applied) error {
	for i, m := range next.tries {
		if err := d.step(fmt.Sprintf("table %d", i)); err != nil {
			return err
		}
		if err := d.putTrie(generation, i, m); err != nil {
			return err
		}
		if err := d.step(fmt.Sprintf("pin %d", i)); err != nil {
			return err
		}
		if err := replaceMapPin(m, filepath.Join(d.pins, pinTrie(generation, i))); err != nil {
			return err
		}
	}
	if err := d.step("settings"); err != nil {
		return err
	}
	setting, err := renderSetting(next.policy)
	if err != nil {
		return err
	}
	setting.RemovedUntil, setting.Handover = lastUntil(next.removed), flag(d.handover)
	if err := d.guardOldPools(setting); err != nil {
		return err
	}
	if err := d.objs.Settings.Put(tableSet(generation), setting); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	if err := d.step("flip"); err != nil {
		return err
	}
	return d.changeState(func(st *masqState) { st.Active = generation })
}

func (d *Datapath) putTrie(generation uint32, which int, m *ebpf.Map) error {
	if err := d.objs.Policies.Put(tableSet(generation)*tries+uint32(which), m); err != nil {
		return fmt.Errorf("write policy table: %w", err)
	}
	return nil
}

// awaitReaders returns when no packet is under way that read the old generation's
// number: writing a map into a map waits for that in the kernel (an RCU grace
// period). The next Apply may then write that generation.
func (d *Datapath) awaitReaders(active uint32, now *applied) error {
	return d.putTrie(active, trieSource, now.tries[trieSource])
}

func (d *Datapath) releaseNew(next *applied) {
	for i, m := range next.tries {
		if m != nil && (d.applied == nil || m != d.applied.tries[i]) {
			m.Close()
		}
	}
}

func (d *Datapath) step(name string) error {
	if d.interrupt == nil {
		return nil
	}
	return d.interrupt(name)
}

// newTrie makes and fills a table. Updates of an unallocated map can fail for
// want of memory at any time, so each one is checked.
func (d *Datapath) newTrie(ctx context.Context, which int, rows []trieEntry) (*ebpf.Map, error) {
	inner := d.trie.Copy()
	inner.Name = trieNames[which]
	if n := uint32(len(rows)); n > inner.MaxEntries {
		return nil, fmt.Errorf("policy: %d prefixes in one table, the limit is %d", n, inner.MaxEntries)
	}
	m, err := ebpf.NewMap(inner)
	if err != nil {
		return nil, fmt.Errorf("create policy table: %w", err)
	}
	if err := d.fillTrie(ctx, m, rows); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

const trieBatch = 4096

func (d *Datapath) fillTrie(ctx context.Context, m *ebpf.Map, rows []trieEntry) error {
	batch := true
	for len(rows) > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := d.step("prefixes"); err != nil {
			return err
		}
		n := min(len(rows), trieBatch)
		keys, values := make([]masqPrefix, n), make([]masqRule, n)
		for i, e := range rows[:n] {
			keys[i], values[i] = e.key, e.value
		}
		if batch {
			_, err := m.BatchUpdate(keys, values, nil)
			switch {
			case errors.Is(err, ebpf.ErrNotSupported):
				batch = false // LPM tries have batches since kernel 5.13
			case err != nil:
				return fmt.Errorf("write policy table: %w", err)
			}
		}
		for i := 0; i < n && !batch; i++ {
			if err := m.Put(keys[i], values[i]); err != nil {
				return fmt.Errorf("write policy table: %w", err)
			}
		}
		rows = rows[n:]
	}
	return nil
}
