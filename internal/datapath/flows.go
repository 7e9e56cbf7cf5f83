package datapath

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/policy"
)

// flowKey is the key of a flow: Local is the inner socket in the forward and
// inbound tables, the external one in the reverse table.
type flowKey struct {
	local, remote netip.AddrPort
	proto         uint8
}

// flowEntry is the value of a flow table, whatever the family.
type flowEntry struct {
	key     flowKey
	xlate   netip.AddrPort // not in the inbound table
	seen    uint32         // second of the monotonic clock
	created uint32
	packets uint32
	bits    uint8
	bytes   uint64
}

// Bits of flowEntry.bits, as in bpf/maps.h.
const (
	bitSyn    = 0x01
	bitFin    = 0x02
	bitRst    = 0x04
	bitData   = 0x08
	bitHost   = 0x10
	bitOut    = 0x20
	bitOutFin = 0x40
	bitAway   = 0x20 // in the reverse table
	bitHeld   = 0x40 // in the reverse table
	bitDead   = 0x80
)

func (e flowEntry) host() bool { return e.bits&bitHost != 0 }

// dead tells whether this is what a mapping that has ended left in the reverse
// table: nobody but its last owner may have the port for a while.
func (e flowEntry) dead() bool { return e.bits&bitDead != 0 }

// inner is the key of the forward half of a reverse entry.
func (e flowEntry) inner() flowKey {
	return flowKey{local: e.xlate, remote: e.key.remote, proto: e.key.proto}
}

// flowTables are the tables of one family.
type flowTables struct {
	forward, reverse, inbound *ebpf.Map
	ipv4                      bool
}

func socket(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, swapPort(port)) }

func key4(k masqTuple4) flowKey {
	return flowKey{socket(addr4From(k.Local), k.Lport), socket(addr4From(k.Remote), k.Rport), k.Proto}
}

func key6(k masqTuple) flowKey {
	return flowKey{socket(addrFrom(k.Local), k.Lport), socket(addrFrom(k.Remote), k.Rport), k.Proto}
}

func entryOf(k flowKey, f masqFlow, xlate netip.Addr) flowEntry {
	return flowEntry{
		key: k, xlate: socket(xlate, f.Port),
		seen: f.Seen, created: f.Created, packets: f.Packets, bits: f.Bits, bytes: f.Bytes,
	}
}

// tuple is the key in the form the reaper takes, v4-mapped.
func (k flowKey) tuple() masqTuple {
	return masqTuple{
		Local: addrTo(k.local.Addr()), Remote: addrTo(k.remote.Addr()),
		Lport: swapPort(k.local.Port()), Rport: swapPort(k.remote.Port()), Proto: k.proto,
	}
}

// foreign tells whether a flow is the node's by its address only: it was forwarded,
// with an address that somebody else gave it. The node's own sockets hold no entry.
func (e flowEntry) foreign() bool {
	return e.host() && e.xlate == e.key.local && (e.key.proto == policy.ProtoTCP || e.key.proto == policy.ProtoUDP)
}

// reverseKey is the key of the other half of a forward entry.
func (e flowEntry) reverseKey() flowKey {
	return flowKey{local: e.xlate, remote: e.key.remote, proto: e.key.proto}
}

func viewFlow4(k masqTuple4, v masqFlow4) flowEntry {
	return entryOf(key4(k), v.Flow, addr4From(v.Addr))
}

func viewFlow6(k masqTuple, v masqFlow6) flowEntry {
	return entryOf(key6(k), v.Flow, addrFrom(v.Addr))
}

func viewInbound(k flowKey, v masqInbound) flowEntry {
	return flowEntry{key: k, seen: v.Seen, created: v.Created, packets: v.Packets, bits: v.Bits}
}

func viewInbound4(k masqTuple4, v masqInbound) flowEntry { return viewInbound(key4(k), v) }
func viewInbound6(k masqTuple, v masqInbound) flowEntry  { return viewInbound(key6(k), v) }

// all yields the entries of a forward or reverse table.
func (t flowTables) all(m *ebpf.Map) iter.Seq2[flowEntry, error] {
	if t.ipv4 {
		return walk(m, viewFlow4)
	}
	return walk(m, viewFlow6)
}

// allInbound yields the connections opened from outside.
func (t flowTables) allInbound() iter.Seq2[flowEntry, error] {
	if t.ipv4 {
		return walk(t.inbound, viewInbound4)
	}
	return walk(t.inbound, viewInbound6)
}

// walk yields the entries of a hash table.
func walk[K, V any](m *ebpf.Map, entry func(K, V) flowEntry) iter.Seq2[flowEntry, error] {
	return func(yield func(flowEntry, error) bool) {
		for b, err := range batches[K, V](m) {
			if err != nil {
				yield(flowEntry{}, err)
				return
			}
			for i := range b.keys {
				if !yield(entry(b.keys[i], b.values[i]), nil) {
					return
				}
			}
		}
	}
}

// chunk is a part of a table, to be used before the next one is asked for.
type chunk[K, V any] struct {
	keys   []K
	values []V
}

// walkBatch is how much of a table one system call reads. Where the kernel does not
// preempt itself, no other task has the CPU until the call returns: 0.1 to 0.2 ms. (Longer
// in an almost empty table: empty buckets do not count, 2^20 of them take 0.6 ms.)
const walkBatch = 256

// eachEntry visits the entries of a hash table until visit has enough.
func eachEntry[K, V any](m *ebpf.Map, visit func(K, V) bool) error {
	for b, err := range batches[K, V](m) {
		if err != nil {
			return err
		}
		for i := range b.keys {
			if !visit(b.keys[i], b.values[i]) {
				return nil
			}
		}
	}
	return nil
}

// batches reads a whole hash table. Packets go on changing it: an entry that is
// new may be missed, one that is there all the time is not.
func batches[K, V any](m *ebpf.Map) iter.Seq2[chunk[K, V], error] {
	return func(yield func(chunk[K, V], error) bool) {
		var cursor ebpf.MapBatchCursor
		size := min(walkBatch, int(m.MaxEntries()))
		keys, values := make([]K, size), make([]V, size)
		for {
			n, err := m.BatchLookup(&cursor, keys, values, nil)
			// The next bucket holds more than the buffer: the same again with a larger one.
			if errors.Is(err, unix.ENOSPC) && len(keys) < int(m.MaxEntries()) {
				keys, values = make([]K, 4*len(keys)), make([]V, 4*len(values))
				continue
			}
			if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				yield(chunk[K, V]{}, fmt.Errorf("read table: %w", err))
				return
			}
			if !yield(chunk[K, V]{keys[:n], values[:n]}, nil) || err != nil {
				return // err: the end
			}
		}
	}
}

// find looks up the entry of k in a forward or reverse table. By pointer, the key is
// passed to the kernel as it is.
func (t flowTables) find(m *ebpf.Map, k flowKey) (flowEntry, bool) {
	if t.ipv4 {
		key := masqTuple4{
			Local: addr4To(k.local.Addr()), Remote: addr4To(k.remote.Addr()),
			Lport: swapPort(k.local.Port()), Rport: swapPort(k.remote.Port()), Proto: k.proto,
		}
		var v masqFlow4
		err := m.Lookup(&key, &v)
		return entryOf(k, v.Flow, addr4From(v.Addr)), err == nil
	}
	key := k.tuple()
	var v masqFlow6
	err := m.Lookup(&key, &v)
	return entryOf(k, v.Flow, addrFrom(v.Addr)), err == nil
}
