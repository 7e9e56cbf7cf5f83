package datapath

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"net/netip"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// Side says who translates the answers of a mapping. It matters while a handover is
// on; without one the programs do.
type Side uint8

const (
	SideOurs Side = 0
	SideAway Side = bitAway // netfilter
	SideHeld Side = bitHeld // nobody for the moment: they are dropped
)

func (s Side) String() string {
	return map[Side]string{SideOurs: "ours", SideAway: "away", SideHeld: "held"}[s]
}

// Flow is a mapping of a pod, to be handed from one translator to another.
type Flow struct {
	Proto   uint8
	Src     netip.AddrPort // the inner socket; ICMP: the identifier stands as the port
	Dst     netip.AddrPort // the remote, ICMP: port 0
	Xlate   netip.AddrPort // the external socket
	State   string         // as in Mapping
	Side    Side
	Age     time.Duration // since creation
	Timeout time.Duration // what is left of its timer; Import gives a whole one
	// Packets and Bytes, out and in.
	Packets [2]uint32
	Bytes   [2]uint64
}

func (f Flow) key() flowKey      { return flowKey{f.Src, f.Dst, f.Proto} }
func (f Flow) external() flowKey { return flowKey{f.Xlate, f.Dst, f.Proto} }

// String shows a flow as an error names it.
func (f Flow) String() string {
	return fmt.Sprintf("protocol %d %s -> %s as %s", f.Proto, f.Src, f.Dst, f.Xlate)
}

// SetHandover says whether netfilter has some of the flows, or gets them. While it is
// on, the sides of mappings count: a packet of the node on the tuple of one that is not ours
// passes, since netfilter has given it the address and port, and another port would end the
// connection. Each Apply keeps it, and so does a restart of the agent.
func (d *Datapath) SetHandover(on bool) error {
	if on && !d.handover {
		// What an earlier change left would hold up flows that are ours since.
		if err := d.clearSides(context.Background()); err != nil {
			return err
		}
	}
	d.handover = on
	st, err := d.state()
	if err != nil || st.Active == noGeneration {
		return err
	}
	return d.changeSetting(st.Active, func(s *masqSetting) { s.Handover = flag(on) })
}

// Handover tells whether one is on.
func (d *Datapath) Handover() bool { return d.handover }

// readHandover finds out what the agent before this one was doing.
func (d *Datapath) readHandover(generation uint32) error {
	s := new(masqSetting)
	if err := d.objs.Settings.Lookup(tableSet(generation), s); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	d.handover = s.Handover != 0
	return nil
}

func flag(on bool) uint32 {
	if on {
		return 1
	}
	return 0
}

// changeSetting changes the setting in force in place: packets see each word of it as it
// was or as it is.
func (d *Datapath) changeSetting(generation uint32, change func(*masqSetting)) error {
	s := new(masqSetting)
	if err := d.objs.Settings.Lookup(tableSet(generation), s); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	change(s)
	if err := d.objs.Settings.Put(tableSet(generation), s); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// Flows returns the mappings of pods, with what another translator has to know.
func (d *Datapath) Flows(ctx context.Context) ([]Flow, error) {
	now, err := monotonicSeconds()
	if err != nil {
		return nil, err
	}
	setting, err := d.activeSetting()
	if err != nil || setting == nil {
		return nil, err
	}
	var out []Flow
	for e, err := range d.forwardEntries(ctx) {
		if err != nil {
			return nil, err
		}
		if !e.host() {
			out = append(out, d.tablesOf(e.key.local.Addr()).flow(e, now, setting))
		}
	}
	return out, nil
}

// forwardEntries are the leaving halves of all flows, of both families.
func (d *Datapath) forwardEntries(ctx context.Context) iter.Seq2[flowEntry, error] {
	return func(yield func(flowEntry, error) bool) {
		for _, t := range d.sweeper.tables {
			for e, err := range t.all(t.forward) {
				if !yield(e, cmp.Or(err, ctx.Err())) {
					return
				}
			}
		}
	}
}

// flow joins both halves of a mapping.
func (t flowTables) flow(e flowEntry, now uint32, setting *masqSetting) Flow {
	r, ok := t.find(t.reverse, e.reverseKey())
	if !ok || r.dead() || r.xlate != e.key.local {
		r = flowEntry{seen: e.seen}
	}
	f := Flow{
		Proto: e.key.proto, Src: e.key.local, Dst: e.key.remote, Xlate: e.xlate, State: e.state(r), Age: age(now, e.created),
		Side: r.side(), Packets: [2]uint32{e.packets, r.packets}, Bytes: [2]uint64{e.bytes, r.bytes},
	}
	idle := min(age(now, e.seen), age(now, r.seen))
	f.Timeout = max(time.Duration(setting.Timeout[timerOf(f)])*time.Second-idle, time.Second)
	return f
}

func (e flowEntry) side() Side { return Side(e.bits & (bitAway | bitHeld)) }

// timerOf is the number of the timer that a mapping runs on: enum timer of bpf/maps.h.
func timerOf(f Flow) int {
	udp := f.Proto == policy.ProtoUDP || f.Proto == policy.ProtoUDPLite
	switch {
	case f.State == "syn":
		return 0
	case f.State == "established":
		return 1
	case f.State == "closing":
		return 2
	case f.State == "query":
		return 5
	case udp && f.State == "one-way":
		return 3
	case udp:
		return 4
	}
	return 6
}

func (d *Datapath) activeSetting() (*masqSetting, error) {
	st, err := d.state()
	if err != nil || st.Active == noGeneration {
		return nil, err
	}
	s := new(masqSetting)
	if err := d.objs.Settings.Lookup(tableSet(st.Active), s); err != nil {
		return nil, fmt.Errorf("read settings: %w", err)
	}
	return s, nil
}

// SetSide says who translates the answers of flows from now on. n is how many of them
// have a mapping still.
func (d *Datapath) SetSide(ctx context.Context, flows []Flow, side Side) (n int, err error) {
	// The program changes the entry in place. A packet of another CPU that notes a flag of TCP at the
	// same time may undo it: look again.
	for range sideAttempts {
		r := &reaper{prog: d.objs.Reap}
		for _, f := range flows {
			if err := r.add(ctx, markRecord(f.external(), side)); err != nil {
				return n, err
			}
		}
		if err := r.flush(ctx); err != nil {
			return n, err
		}
		if n == 0 {
			n = r.removed
		}
		if flows = d.otherSide(flows, side); len(flows) == 0 {
			return n, nil
		}
	}
	return n, fmt.Errorf("mark flows: %d of them do not stay %s", len(flows), side)
}

const sideAttempts = 5

func markRecord(external flowKey, side Side) masqReapRecord {
	return masqReapRecord{Key: external.tuple(), Table: reapMark, Percent: uint32(side)}
}

// otherSide returns those flows whose mapping is marked otherwise.
func (d *Datapath) otherSide(flows []Flow, side Side) (out []Flow) {
	for _, f := range flows {
		t := d.tablesOf(f.Src.Addr())
		e, ok := t.find(t.reverse, f.external())
		if ok && !e.dead() && !e.host() && e.side() != side {
			out = append(out, f)
		}
	}
	return out
}

func (d *Datapath) tablesOf(a netip.Addr) flowTables { return d.sweeper.tables[familyOf(a)] }

// Shifted returns the flows of the node, and of others with its address, that got another
// port because a mapping has theirs. They end with the programs.
func (d *Datapath) Shifted(ctx context.Context) (out []Flow, err error) {
	for e, err := range d.forwardEntries(ctx) {
		if err != nil {
			return nil, err
		}
		if e.host() && e.xlate != e.key.local {
			out = append(out, Flow{Proto: e.key.proto, Src: e.key.local, Dst: e.key.remote, Xlate: e.xlate})
		}
	}
	return out, nil
}

// clearSides makes all mappings ours.
func (d *Datapath) clearSides(ctx context.Context) error {
	r := &reaper{prog: d.objs.Reap}
	for _, t := range d.sweeper.tables {
		for e, err := range t.all(t.reverse) {
			if err == nil && e.side() != SideOurs && !e.host() && !e.dead() {
				err = r.add(ctx, markRecord(e.key, SideOurs))
			}
			if err != nil {
				return err
			}
		}
	}
	return r.flush(ctx)
}

// Forget removes the mappings of flows that another translator has now.
func (d *Datapath) Forget(ctx context.Context, flows []Flow) (n int, err error) {
	r := &reaper{prog: d.objs.Reap}
	for _, f := range flows {
		if err := r.add(ctx, masqReapRecord{Key: f.key().tuple(), Table: reapForward, Force: 1}); err != nil {
			return r.removed, err
		}
	}
	err = r.flush(ctx)
	return r.removed, err
}
