package datapath

import (
	"hash/maphash"
	"net/netip"

	"bauta.dev/bauta/internal/policy"
)

// pairFilter remembers which reverse entries have a forward entry, in one bit each
// and so with mistakes: an orphan may hide behind another flow's bit. The seed
// differs in every walk, so it does not hide for long.
type pairFilter struct {
	bits []uint64
	seed uint64
}

const (
	pairBitsPerFlow = 16
	pairBitsAtLeast = 1 << 18
)

func newPairFilter(flows int, seed uint64) pairFilter {
	return pairFilter{make([]uint64, max(2*flows*pairBitsPerFlow, pairBitsAtLeast)/64), seed}
}

func (f pairFilter) bit(k flowKey) (word, mask uint64) {
	h := k.hash() + f.seed
	h = (h ^ h>>31) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	return h / 64 % uint64(len(f.bits)), 1 << (h % 64)
}

func (f pairFilter) add(k flowKey) {
	word, mask := f.bit(k)
	f.bits[word] |= mask
}

func (f pairFilter) has(k flowKey) bool {
	word, mask := f.bit(k)
	return f.bits[word]&mask != 0
}

var hashSeed = maphash.MakeSeed()

func (k flowKey) hash() uint64 { return maphash.Comparable(hashSeed, k) }

// portTally finds the remote towards which most ports are taken. It keeps a hash
// of each remote only: there may be as many remotes as flows.
type portTally struct {
	most PortUse
	used map[uint64]int
	// Ports of ended mappings: that the walk before this one left, and that this one leaves.
	graves, buried map[uint64]int
}

// portGroup is what a port must be unique within.
type portGroup struct {
	proto  uint8
	addr   netip.Addr
	remote netip.AddrPort
}

func (g portGroup) hash() uint64 { return maphash.Comparable(hashSeed, g) }

// scarce tells whether so many ports towards the remote of a reverse entry are taken
// that none can wait for an owner to come back.
func (t *portTally) scarce(e flowEntry) bool {
	h := portGroup{e.key.proto, e.key.local.Addr(), e.key.remote}.hash()
	return t.used[h]+t.graves[h] > int(lowWater*float64(t.most.Pool))
}

// bury counts a port that waits.
func (t *portTally) bury(e flowEntry) {
	t.buried[portGroup{e.key.proto, e.key.local.Addr(), e.key.remote}.hash()]++
}

// newPortTally begins with room for as many remotes as one knows of: a map that grows to
// a million entries copies them all several times.
func newPortTally(pool, remotes int) *portTally {
	return &portTally{most: PortUse{Pool: pool}, used: make(map[uint64]int, remotes), buried: make(map[uint64]int)}
}

func (t *portTally) add(e flowEntry) {
	switch e.key.proto {
	case policy.ProtoTCP, policy.ProtoUDP, policy.ProtoUDPLite, policy.ProtoSCTP:
	default:
		return
	}
	h := portGroup{e.key.proto, e.xlate.Addr(), e.key.remote}.hash()
	n := t.used[h] + 1
	t.used[h] = n
	if n > t.most.Used {
		t.most.Used = n
		t.most.Proto, t.most.Addr, t.most.Remote = e.key.proto, e.xlate.Addr(), e.key.remote
	}
}

func (t *portTally) worst() PortUse { return t.most }
