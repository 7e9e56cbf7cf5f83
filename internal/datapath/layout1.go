package datapath

import (
	"encoding/binary"

	"github.com/cilium/ebpf"
)

// Layout 1: the first release. Its entries, as far as they are carried over; the
// programs of that version write them until the last device has been switched.

type layout1Flow struct {
	Seen    uint32
	Created uint32
	Packets uint32
	Port    uint16
	Bits    uint8
	Tag     uint8
	Bytes   uint64
}

type layout1Flow4 struct {
	Flow layout1Flow
	Addr uint32
	_    uint32
}

type layout1Flow6 struct {
	Flow layout1Flow
	Addr masqAddr
}

type layout1Inbound struct {
	Seen    uint32
	Created uint32
	Packets uint32
	Bits    uint8
	_       [3]uint8
}

func (f layout1Flow) flow() masqFlow {
	return masqFlow{Seen: f.Seen, Created: f.Created, Packets: f.Packets, Port: f.Port, Bits: f.Bits, Tag: f.Tag, Bytes: f.Bytes}
}

var layout1 = format{
	flow4: carry(func(k masqTuple4, v layout1Flow4) (masqTuple4, masqFlow4) {
		return k, masqFlow4{Flow: v.Flow.flow(), Addr: v.Addr}
	}, viewFlow4),
	flow6: carry(func(k masqTuple, v layout1Flow6) (masqTuple, masqFlow6) {
		return k, masqFlow6{Flow: v.Flow.flow(), Addr: v.Addr}
	}, viewFlow6),
	inbound4: carry(func(k masqTuple4, v layout1Inbound) (masqTuple4, masqInbound) {
		return k, masqInbound{Seen: v.Seen, Created: v.Created, Packets: v.Packets, Bits: v.Bits}
	}, viewInbound4),
	inbound6: carry(func(k masqTuple, v layout1Inbound) (masqTuple, masqInbound) {
		return k, masqInbound{Seen: v.Seen, Created: v.Created, Packets: v.Packets, Bits: v.Bits}
	}, viewInbound6),
	inherit: layout1Inherit,
}

// layout1Inherit reads control (active, layout, learn_until, pad, seed) and the set
// of guarded ports in the settings in force.
func layout1Inherit(control, settings *ebpf.Map) (in inheritance, err error) {
	var state struct {
		Active, Layout, LearnUntil, _ uint32
		Seed                          uint64
	}
	if err := control.Lookup(uint32(0), &state); err != nil {
		return in, err
	}
	in.seed, in.learnUntil = state.Seed, state.LearnUntil
	if state.Active == noGeneration {
		return in, nil
	}
	b, err := settings.LookupBytes(state.Active)
	if err != nil {
		return in, err
	}
	const guarded = 12592 // offset in struct setting
	if len(b) < guarded+len(in.guarded)*8 {
		return in, errShortSetting
	}
	for i := range in.guarded {
		in.guarded[i] = binary.NativeEndian.Uint64(b[guarded+8*i:])
	}
	return in, nil
}
