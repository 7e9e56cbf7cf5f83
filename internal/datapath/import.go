package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/policy"
)

// Reasons for which a flow is not imported.
var (
	ErrTaken  = errors.New("another flow has this port towards this remote")
	ErrMapped = errors.New("the flow has another mapping")
	ErrFull   = errors.New("the flow table is full")
	errFlow   = errors.New("not the addresses of one flow")
)

// Refusal is a flow that was not imported, and why.
type Refusal struct {
	Flow Flow
	Err  error
}

// Import makes mappings of flows that another translator has, each with the side that it
// says. A flow that is mapped like that already counts as taken, and stays as it is. An
// entry of the node with the same external socket is replaced: netfilter's own packets made
// it. Quotas count imported flows, but refuse none. err says that it was not finished.
func (d *Datapath) Import(ctx context.Context, flows []Flow) (taken int, refused []Refusal, err error) {
	now, err := monotonicSeconds()
	if err != nil {
		return 0, nil, err
	}
	if err := d.guardPorts(flows); err != nil {
		return 0, nil, err
	}
	for _, f := range flows {
		if err := ctx.Err(); err != nil {
			return taken, refused, err
		}
		err := d.importFlow(ctx, f, now)
		switch {
		case err == nil:
			taken++
		case errors.Is(err, ErrTaken) || errors.Is(err, ErrMapped) || errors.Is(err, ErrFull) || errors.Is(err, errFlow):
			refused = append(refused, Refusal{f, err})
		default:
			return taken, refused, fmt.Errorf("import %s: %w", f, err)
		}
	}
	return taken, refused, nil
}

// guardPorts makes the node's packets mind ports outside of the pool that another
// translator has given away.
func (d *Datapath) guardPorts(flows []Flow) error {
	st, err := d.state()
	if err != nil || st.Active == noGeneration || len(flows) == 0 {
		return err
	}
	return d.changeSetting(st.Active, func(s *masqSetting) {
		for _, f := range flows {
			s.Guarded[f.Xlate.Port()/64] |= 1 << (f.Xlate.Port() % 64)
		}
	})
}

func (f Flow) valid() bool {
	for _, a := range []netip.AddrPort{f.Src, f.Dst, f.Xlate} {
		if !a.IsValid() || a.Addr().Is4() != f.Src.Addr().Is4() || a.Addr().Is4In6() {
			return false
		}
	}
	return f.Src != f.Xlate
}

// importFlow writes both halves in the order in which the programs do: no answer meets
// a forward half alone.
func (d *Datapath) importFlow(ctx context.Context, f Flow, now uint32) error {
	if !f.valid() {
		return errFlow
	}
	t := d.tablesOf(f.Src.Addr())
	forward, reverse := f.entries(now)
	if old, ok := t.find(t.forward, f.key()); ok && old.xlate != f.Xlate {
		return ErrMapped
	}
	added, err := t.reserve(reverse)
	if err != nil {
		return full(err)
	}
	err = t.write(t.forward, forward, ebpf.UpdateNoExist)
	if errors.Is(err, ebpf.ErrKeyExist) {
		if old, ok := t.find(t.forward, f.key()); ok && old.xlate == f.Xlate {
			return nil // imported before, and counted
		}
		err = ErrMapped // a packet was faster
	}
	if err != nil {
		if added {
			err = errors.Join(full(err), t.remove(t.reverse, f.external()))
		}
		return full(err)
	}
	return d.countImport(ctx, f.Src.Addr())
}

func full(err error) error {
	if isFull(err) {
		return ErrFull
	}
	return err
}

// reserve writes the reverse half. added: it was not there.
func (t flowTables) reserve(e flowEntry) (added bool, err error) {
	err = t.write(t.reverse, e, ebpf.UpdateNoExist)
	if !errors.Is(err, ebpf.ErrKeyExist) {
		return err == nil, err
	}
	old, ok := t.find(t.reverse, e.key)
	switch {
	case ok && old.dead(): // waits for its last owner, but is in use again
	case ok && old.xlate == e.xlate:
		return false, nil
	case ok && old.host() && old.xlate == old.key.local:
		// Made by a packet that netfilter had translated. Its forward half ends last: alone, the
		// programs see that it has lost its port.
		defer func() {
			if err == nil {
				err = t.remove(t.forward, old.inner())
			}
		}()
	case ok:
		return false, ErrTaken
	}
	return true, t.write(t.reverse, e, ebpf.UpdateAny)
}

// countImport books a mapping on its pod, as the programs do.
func (d *Datapath) countImport(ctx context.Context, pod netip.Addr) error {
	err := d.objs.Pods.Update(addrTo(pod), masqPod{Flows: 1}, ebpf.UpdateNoExist)
	if errors.Is(err, unix.E2BIG) {
		return nil // not counted, and so not bounded
	}
	if !errors.Is(err, ebpf.ErrKeyExist) {
		return err
	}
	r := reaper{prog: d.objs.Reap}
	if err := r.add(ctx, masqReapRecord{Key: masqTuple{Local: addrTo(pod)}, Table: reapPod, Percent: 1}); err != nil {
		return err
	}
	return r.flush(ctx)
}

// entries are the halves of a mapping that is in the flow's state.
func (f Flow) entries(now uint32) (forward, reverse flowEntry) {
	created := now - uint32(f.Age.Seconds())
	forward = flowEntry{key: f.key(), xlate: f.Xlate, seen: now, created: created, packets: f.Packets[0], bytes: f.Bytes[0]}
	reverse = flowEntry{key: f.external(), xlate: f.Src, seen: now, created: created, packets: f.Packets[1], bytes: f.Bytes[1]}
	switch f.State {
	case "established", "closing", "two-way":
		reverse.packets = max(reverse.packets, 1) // it was answered
	}
	if f.Proto == policy.ProtoTCP {
		bits := map[string]uint8{"syn": bitSyn, "established": bitSyn | bitData, "closing": bitSyn | bitData | bitFin}[f.State]
		forward.bits, reverse.bits = bits, bits
		if reverse.packets == 0 {
			reverse.bits = 0
		}
	}
	reverse.bits |= uint8(f.Side)
	return forward, reverse
}

// tag is flow_tag() of bpf/flow.h.
func (k masqTuple) tag() uint8 {
	h := k.Local.W[3] ^ k.Remote.W[3]*0x9e3779b1 ^ k.Remote.W[1]*0x85ebca6b ^ k.Local.W[2] ^
		(uint32(k.Lport)<<16 | uint32(k.Rport)) ^ uint32(k.Proto)
	return uint8(h * 0xc2b2ae35 >> 24)
}

func (k masqTuple) short() masqTuple4 {
	return masqTuple4{Local: k.Local.W[3], Remote: k.Remote.W[3], Lport: k.Lport, Rport: k.Rport, Proto: k.Proto}
}

// write writes an entry as the programs would.
func (t flowTables) write(m *ebpf.Map, e flowEntry, how ebpf.MapUpdateFlags) error {
	key := e.key.tuple()
	flow := masqFlow{
		Seen: e.seen, Created: e.created, Packets: e.packets, Port: swapPort(e.xlate.Port()), Bits: e.bits, Tag: key.tag(), Bytes: e.bytes,
	}
	if t.ipv4 {
		return m.Update(key.short(), masqFlow4{Flow: flow, Addr: addr4To(e.xlate.Addr())}, how)
	}
	return m.Update(key, masqFlow6{Flow: flow, Addr: addrTo(e.xlate.Addr())}, how)
}

func (t flowTables) remove(m *ebpf.Map, k flowKey) error {
	key := k.tuple()
	var err error
	if t.ipv4 {
		err = m.Delete(key.short())
	} else {
		err = m.Delete(key)
	}
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
