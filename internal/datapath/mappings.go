package datapath

import (
	"time"

	"bauta.dev/bauta/internal/policy"
)

// selects tells whether f takes an entry keyed by its inner socket.
func (f Filter) selects(e flowEntry, other bool) bool {
	switch {
	case other && !f.All:
		return false
	case f.Pod.IsValid() && f.Pod != e.key.local.Addr():
		return false
	case f.Remote.IsValid() && f.Remote != e.key.remote.Addr():
		return false
	case f.Port != 0 && f.Port != e.key.remote.Port():
		return false
	case f.Proto != 0 && f.Proto != e.key.proto:
		return false
	}
	return true
}

// Mappings returns the entries that f selects, both directions of each mapping.
// The order is that of the tables.
func (i *Inspector) Mappings(f Filter) ([]Mapping, error) {
	now, err := monotonicSeconds()
	if err != nil {
		return nil, err
	}
	var out []Mapping
	for _, t := range i.tables {
		for e, err := range t.all(t.forward) {
			if err != nil {
				return nil, err
			}
			if !f.selects(e, e.host()) {
				continue
			}
			r, ok := t.find(t.reverse, e.reverseKey())
			if ok = ok && r.xlate == e.key.local && !r.dead(); !ok {
				r = flowEntry{}
			}
			out = append(out, e.leaving(now, e.state(r)))
			if ok {
				out = append(out, r.arriving(now, e.state(r)))
			}
		}
		if !f.All {
			continue
		}
		for e, err := range t.allInbound() {
			if err != nil {
				return nil, err
			}
			if f.selects(e, false) {
				out = append(out, e.inbound(now))
			}
		}
	}
	return out, nil
}

func age(now, created uint32) time.Duration {
	return time.Duration(max(int32(now-created), 0)) * time.Second
}

func (e flowEntry) leaving(now uint32, state string) Mapping {
	m := Mapping{Kind: KindMapping, Proto: e.key.proto, Out: true, Src: e.key.local, Dst: e.key.remote, Xlate: e.xlate,
		Age: age(now, e.created), State: state, Packets: e.packets, Bytes: e.bytes}
	if e.host() {
		m.Kind = KindHost
	}
	return m
}

func (e flowEntry) arriving(now uint32, state string) Mapping {
	m := e.leaving(now, state)
	m.Out, m.Src, m.Dst = false, e.key.remote, e.key.local
	return m
}

func (e flowEntry) inbound(now uint32) Mapping {
	m := Mapping{Kind: KindInbound, Proto: e.key.proto, Src: e.key.remote, Dst: e.key.local, Xlate: e.key.local,
		Age: age(now, e.created), State: "one-way", Packets: e.packets}
	switch {
	case isQuery(e.key):
		m.State = "query"
	case e.key.proto != policy.ProtoTCP:
	case e.bits&bitRst != 0 || e.bits&(bitFin|bitOutFin) == bitFin|bitOutFin:
		m.State = "closing"
	case e.bits&(bitData|bitOut) == bitData|bitOut:
		m.State = "established"
	default:
		m.State = "syn"
	}
	return m
}

func isQuery(k flowKey) bool {
	return k.proto == policy.ProtoICMP && k.local.Addr().Is4() || k.proto == policy.ProtoICMPv6 && k.local.Addr().Is6()
}

// state names what flow_timer in bpf/flow.h runs a mapping on; r is its other
// half, the zero entry if there is none.
func (e flowEntry) state(r flowEntry) string {
	answered := r.packets > 0
	switch {
	case isQuery(e.key):
		return "query"
	case e.key.proto != policy.ProtoTCP && answered:
		return "two-way"
	case e.key.proto != policy.ProtoTCP:
		return "one-way"
	case (e.bits|r.bits)&bitRst != 0 || e.bits&r.bits&bitFin != 0:
		return "closing"
	case answered && e.bits&bitData != 0:
		return "established"
	}
	return "syn"
}
