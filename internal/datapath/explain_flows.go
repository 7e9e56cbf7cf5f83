package datapath

import (
	"errors"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/policy"
)

// prepare gives the twin what the packet of key could meet in the live tables: whatever has an
// external socket towards the same remote, its own flow, and what its pod has and was refused.
// It tells whether there is a connection opened from outside.
func (e *Explainer) prepare(key flowKey) (inbound bool, err error) {
	live := e.in.tables[1]
	if key.local.Addr().Is4() {
		live = e.in.tables[0]
	}
	taken, err := live.reservedTowards(key)
	if err != nil {
		return false, err
	}
	sizes, err := live.sizes(taken)
	if err == nil {
		err = e.resize(sizes)
	}
	if err != nil {
		return false, err
	}
	for _, m := range e.twin.own() {
		if err := forget(m); err != nil {
			return false, err
		}
	}
	own := e.twin.tables(live.ipv4)
	if err := taken.put(own.reverse); err != nil {
		return false, err
	}
	if inbound, err = e.copyLive(key, live, own); err != nil {
		return false, err
	}
	if sizes.forwardFull {
		err = own.fill(own.forward)
	}
	if sizes.reverseFull && err == nil {
		err = own.fill(own.reverse)
	}
	return inbound, err
}

// sizes are those of the tables of a twin that gets the reserved entries: one whose live table
// is full must be full for the program too.
func (t flowTables) sizes(taken reserved) (s twinSizes, err error) {
	s.forward, s.reverse = twinRoom, twinRoom
	for int(s.reverse) < taken.n+2 {
		s.reverse *= 2
	}
	if taken.seen < int(t.reverse.MaxEntries()) {
		return s, nil // then the forward table, whose entries all have one there, is not full either
	}
	s.reverse, s.reverseFull = uint32(max(taken.n, 1)), true
	seen := 0
	for _, err := range t.all(t.forward) {
		if err != nil {
			return s, err
		}
		seen++
	}
	if seen >= int(t.forward.MaxEntries()) {
		s.forward, s.forwardFull = 2, true // what copyLive has at most
	}
	return s, nil
}

// copyLive copies single entries that the packet of key could meet.
func (e *Explainer) copyLive(key flowKey, live, own flowTables) (inbound bool, err error) {
	answers := flowKey{local: key.remote, remote: key.local, proto: key.proto} // a flow that this packet is an answer to
	for _, c := range []struct {
		from, to *ebpf.Map
		key      any
	}{
		{live.forward, own.forward, own.rawKey(key)},
		{live.forward, own.forward, own.rawKey(answers)},
		{live.inbound, own.inbound, own.rawKey(key)},
		{e.live[pinShares], e.twin.Shares, uint32(0)},
		{e.live[pinPods], e.twin.Pods, addrTo(key.local.Addr())},
		{e.live[pinRefusals], e.twin.Refusals, refusedKey(key)},
	} {
		found, err := copyEntry(c.from, c.to, c.key)
		if err != nil {
			return false, err
		}
		inbound = inbound || found && c.from == live.inbound
	}
	return inbound, nil
}

// resize loads the twin, unless there is one of that size.
func (e *Explainer) resize(sizes twinSizes) error {
	if e.twin != nil && e.twin.sizes == sizes {
		return nil
	}
	next, err := e.loadTwin(sizes)
	if err != nil {
		return err
	}
	if e.twin != nil {
		e.twin.Close()
	}
	e.twin = next
	return nil
}

// reserved are entries of a reverse table.
type reserved struct {
	n, seen int // picked, and looked at
	put     func(to *ebpf.Map) error
}

// reservedTowards picks those of the reverse table with the remote of key.
func (t flowTables) reservedTowards(key flowKey) (reserved, error) {
	want := key.tuple()
	if t.ipv4 {
		return gather[masqTuple4, masqFlow4](t.reverse, func(k masqTuple4) bool {
			return k.Remote == want.Remote.W[3] && k.Rport == want.Rport && k.Proto == want.Proto
		})
	}
	return gather[masqTuple, masqFlow6](t.reverse, func(k masqTuple) bool {
		return k.Remote == want.Remote && k.Rport == want.Rport && k.Proto == want.Proto
	})
}

func gather[K, V any](m *ebpf.Map, want func(K) bool) (r reserved, err error) {
	var keys []K
	var values []V
	err = eachEntry(m, func(k K, v V) bool {
		r.seen++
		if want(k) {
			keys, values = append(keys, k), append(values, v)
		}
		return true
	})
	r.n = len(keys)
	r.put = func(to *ebpf.Map) error {
		for i := range keys {
			if err := to.Put(&keys[i], &values[i]); err != nil {
				return err
			}
		}
		return nil
	}
	return r, err
}

// fill takes the room that is left in a table, with entries that no packet meets.
func (t flowTables) fill(m *ebpf.Map) error {
	nobody := netip.IPv6Unspecified()
	if t.ipv4 {
		nobody = netip.IPv4Unspecified()
	}
	value := make([]byte, m.ValueSize())
	for port := range m.MaxEntries() {
		key := flowKey{local: netip.AddrPortFrom(nobody, uint16(port)), remote: netip.AddrPortFrom(nobody, 0)}
		switch err := m.Update(t.rawKey(key), value, ebpf.UpdateNoExist); {
		case errors.Is(err, unix.E2BIG):
			return nil
		case err != nil:
			return err
		}
	}
	return nil
}

// rawKey is k as the tables of the family have it.
func (t flowTables) rawKey(k flowKey) any {
	full := k.tuple()
	if !t.ipv4 {
		return full
	}
	return masqTuple4{Local: full.Local.W[3], Remote: full.Remote.W[3], Lport: full.Lport, Rport: full.Rport, Proto: full.Proto}
}

// refusedKey is quota_refusal_key of bpf/quota.h.
func refusedKey(k flowKey) masqRefused {
	r := masqRefused{
		Pod: addrTo(k.local.Addr()), Remote: addrTo(k.remote.Addr()), Rport: swapPort(k.remote.Port()), Proto: k.proto,
	}
	if k.local.Port() < 1024 {
		r.Privileged = 1
	}
	return r
}

// copyEntry copies an entry if there is one.
func copyEntry(from, to *ebpf.Map, key any) (found bool, err error) {
	value, err := from.LookupBytes(key)
	if err != nil || value == nil {
		return false, err
	}
	return true, to.Put(key, value)
}

// forget removes all entries of a small hash table.
func forget(m *ebpf.Map) error {
	for {
		key, err := m.NextKeyBytes(nil)
		if err != nil || key == nil {
			return err
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
}

// Match finds the entry of the policy in force by which an address gets an outcome: of the
// table by source, or else of that by destination. The invalid Prefix: there is none.
func (i *Inspector) Match(o policy.Outcome, src, dst netip.Addr) (netip.Prefix, error) {
	which, addr := trieDestination, dst
	switch {
	case o == policy.PassHost:
		which, addr = trieSource, src
	case o.Verdict() != policy.Pass:
		which, addr, o = trieSource, src, policy.Continue
	}
	all, err := i.prefixes(which, func(r masqRule) bool { return policy.Outcome(r.Outcome) == o })
	var longest netip.Prefix
	for _, p := range all {
		if p.Contains(addr) && p.Bits() > longest.Bits() {
			longest = p
		}
	}
	return longest, err
}
