package datapath

import (
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// What the fuzz tests know of the state behind a packet: notes on fragmented datagrams, the clocks of
// flows, and what a new connection on an old mapping begins with.

// noteOf names a fragmented datagram as the wire has it before the programs.
type noteOf struct {
	dir      direction
	src, dst string
	id       uint32
	proto    uint8 // of IPv4
}

// noteFor is what was done to the first fragment.
type noteFor struct {
	addr    string // if it was translated, the new one
	outcome policy.Outcome
	at      time.Time
}

func noteKey(dir direction, v wire) noteOf {
	k := noteOf{dir: dir, src: v.src.String(), dst: v.dst.String(), id: v.id}
	if v.is4 {
		k.proto = v.proto
	}
	return k
}

// fragment checks that a later fragment gets what its first got, and remembers what that is. No
// fragment of another datagram may speak for it: not one with another ID, protocol or direction.
func (w *world) fragment(dir direction, v wire, res result) {
	w.t.Helper()
	k := noteKey(dir, v)
	out, _ := viewIP(res.data, v.l3, v.is4, false)
	addr := out.src.String()
	if dir == ingress {
		addr = out.dst.String()
	}
	translated := res.outcome.Verdict() == policy.Masquerade
	switch {
	case v.later:
		note, noted := w.notes[k]
		fresh := noted && time.Since(note.at) < 3*time.Second // they are kept for 5
		switch {
		case translated && (note.outcome != policy.MasqFragment || note.addr != addr):
			w.failf(dir, v.frame, res, "a later fragment: its first got %s %s", note.outcome, note.addr)
		case !translated && fresh && note.outcome == policy.MasqFragment:
			w.failf(dir, v.frame, res, "a later fragment is not translated, its first was to %s", note.addr)
		case dir == egress && (res.outcome == policy.PassInbound || res.outcome == policy.PassProtocol) && note.outcome != res.outcome:
			w.failf(dir, v.frame, res, "a later fragment: its first got %s", note.outcome)
		}
	case !v.first:
	case translated && !(dir == egress && res.outcome == policy.MasqError && w.isHost(v.src)):
		w.notes[k] = noteFor{addr, policy.MasqFragment, time.Now()}
	case dir == ingress, res.outcome == policy.PassInbound, res.outcome == policy.PassProtocol:
		w.notes[k] = noteFor{outcome: res.outcome, at: time.Now()}
	}
}

// reopens tells whether v is the SYN of a new connection on the mapping of one that has seen more.
func (w *world) reopens(v wire) bool {
	if v.proto != packet.TCP || v.hidden || v.later || !v.decidable(0).Opening() {
		return false
	}
	e, ok := w.entry(forwardTable, v.leaving())
	return ok && !e.host() && e.bits&(bitData|bitFin|bitRst) != 0
}

// reopened checks that both halves of the mapping have forgotten the connection before.
func (w *world) reopened(v wire, res result) {
	w.t.Helper()
	f, _ := w.entry(forwardTable, v.leaving())
	rev := v.leaving()
	rev.local = f.xlate
	if r, _ := w.entry(reverseTable, rev); f.bits != bitSyn || r.bits&^bitHost != 0 {
		w.failf(egress, v.frame, res, "a new connection, on a mapping with the flags %#x and back %#x", f.bits, r.bits)
	}
}

// entry reads an entry of a flow table.
func (w *world) entry(pick func(flowTables) *ebpf.Map, f flowOf) (flowEntry, bool) {
	for _, t := range w.rig.d.sweeper.tables {
		if t.ipv4 == f.local.Addr().Is4() {
			return t.find(pick(t), flowKey{local: f.local, remote: f.remote, proto: f.proto})
		}
	}
	return flowEntry{}, false
}

// The tables whose entries have clocks.
const (
	forwardClock = iota
	reverseClock
	inboundClock
)

var clocked = [3]func(flowTables) *ebpf.Map{forwardTable, reverseTable, inboundTable}

// clocks is what happened since all flows were aged: the ones that were used are fresh again.
type clocks struct {
	fresh [len(clocked)]map[flowOf]bool
	reset [len(clocked)]map[flowOf]bool // the last packet was a RST: another one does not keep the flow
}

const fuzzAge = 100 // seconds

// grow ages all flows.
func (w *world) grow() {
	w.t.Helper()
	w.clocks = &clocks{}
	for i, pick := range clocked {
		w.age(pick, fuzzAge)
		w.clocks.fresh[i], w.clocks.reset[i] = make(map[flowOf]bool), make(map[flowOf]bool)
		for _, e := range w.flows(pick) {
			w.clocks.reset[i][flowOf{e.key.proto, e.key.local, e.key.remote}] = e.bits&bitRst != 0
		}
	}
}

// touch notes a packet of a flow.
func (c *clocks) touch(clock int, f flowOf, v wire) {
	if c == nil {
		return
	}
	rst := v.proto == packet.TCP && v.decidable(0).TCPFlags&packet.RST != 0
	if clock == inboundClock || !rst || !c.reset[clock][f] {
		c.fresh[clock][f] = true
	}
	c.reset[clock][f] = rst
}

// answers notes an answer to a connection opened from outside: TCP alone is kept by them.
func (c *clocks) answers(v wire) {
	if c != nil && v.proto == packet.TCP && !v.later {
		c.fresh[inboundClock][v.leaving()] = true
	}
}

// checkClocks checks that those flows are fresh of which there was a packet since all were aged: not
// by an error about them, nor by a later fragment.
func (w *world) checkClocks() {
	w.t.Helper()
	now, err := monotonicSeconds()
	w.must(err)
	for i, pick := range clocked {
		for _, e := range w.flows(pick) {
			f := flowOf{e.key.proto, e.key.local, e.key.remote}
			if fresh := now-e.seen < fuzzAge/2; !e.host() && !e.dead() && fresh != w.clocks.fresh[i][f] {
				w.t.Fatalf("table %d, flow %+v: seen %d s ago, want fresh %v", i, e, now-e.seen, !fresh)
			}
		}
	}
}
