package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
)

// flowLists shows netfilter's connections as the flow tables of eBPF mode are shown.
type flowLists struct {
	ctx     context.Context
	list    func(context.Context, conntrack.Filter) ([]conntrack.Flow, error)
	end     func(context.Context, []conntrack.Flow) (int, error)
	now     func() time.Time
	sources []netip.Prefix // nil: not known, then what is translated counts as ours
	host    []netip.Addr
}

func newFlowLists(ctx context.Context, file *PolicyFile) flowLists {
	l := flowLists{ctx: ctx, list: conntrack.List, end: conntrack.Delete, now: time.Now, sources: sourceRanges(file)}
	if file != nil {
		l.host = file.HostAddrs
	}
	return l
}

// kind tells what a connection is to us; false: nothing.
func (l flowLists) kind(f conntrack.Flow) (datapath.Kind, bool) {
	src, dst := f.Src.Addr(), remoteOf(f).Addr()
	ours := len(l.sources) == 0 || within(l.sources, src)
	switch {
	case slices.Contains(l.host, src):
		return datapath.KindHost, !slices.Contains(l.host, dst) && !dst.IsLoopback()
	case f.SNAT && ours:
		return datapath.KindMapping, true
	case len(l.sources) > 0 && !ours && within(l.sources, dst):
		return datapath.KindInbound, true
	}
	return "", false
}

// remoteOf is whom the packets of a connection reach: a service address is judged by the
// endpoint, in both modes.
func remoteOf(f conntrack.Flow) netip.AddrPort {
	if f.Remote.IsValid() {
		return f.Remote
	}
	return f.Dst
}

// ends are those of a connection by what they are to a pod or the node.
func ends(f conntrack.Flow, kind datapath.Kind) (inner, remote netip.AddrPort) {
	if kind == datapath.KindInbound {
		return remoteOf(f), f.Src
	}
	return f.Src, remoteOf(f)
}

func (l flowLists) selects(f conntrack.Flow, by datapath.Filter) (datapath.Kind, bool) {
	kind, ok := l.kind(f)
	inner, remote := ends(f, kind)
	switch {
	case !ok, kind != datapath.KindMapping && !by.All:
		return "", false
	case by.Pod.IsValid() && by.Pod != inner.Addr():
		return "", false
	case by.Remote.IsValid() && (by.Remote != remote.Addr() || by.Port != 0 && by.Port != remote.Port()):
		return "", false
	case by.Proto != 0 && by.Proto != f.Proto:
		return "", false
	}
	return kind, true
}

// Mappings are the connections that a filter selects, both directions of each.
func (l flowLists) Mappings(by datapath.Filter) ([]datapath.Mapping, error) {
	ask := conntrack.Filter{Sources: l.sources, Translated: true, AnyZone: true}
	if by.All {
		ask = conntrack.Filter{AnyZone: true}
	}
	flows, err := l.list(l.ctx, ask)
	if err != nil {
		return nil, fmt.Errorf("list flows: %w", err)
	}
	var out []datapath.Mapping
	for _, f := range flows {
		kind, ok := l.selects(f, by)
		if !ok {
			continue
		}
		m := datapath.Mapping{Kind: kind, Proto: f.Proto, State: f.State, Age: l.age(f)}
		inner, remote := ends(f, kind)
		if kind == datapath.KindInbound {
			m.Src, m.Dst, m.Xlate = remote, inner, inner
			m.Packets, m.Bytes = uint32(f.Packets[0]), f.Bytes[0]
			out = append(out, m)
			continue
		}
		leaving, arriving := m, m
		leaving.Out, leaving.Src, leaving.Dst, leaving.Xlate = true, inner, remote, f.Xlate
		leaving.Packets, leaving.Bytes = uint32(f.Packets[0]), f.Bytes[0]
		arriving.Src, arriving.Dst, arriving.Xlate = remote, f.Xlate, inner
		arriving.Packets, arriving.Bytes = uint32(f.Packets[1]), f.Bytes[1]
		out = append(out, leaving, arriving)
	}
	return out, nil
}

// age is zero if netfilter has not noted when the flow began.
func (l flowLists) age(f conntrack.Flow) time.Duration {
	if f.Created.IsZero() {
		return 0
	}
	return max(l.now().Sub(f.Created), 0)
}

// Flush ends the mappings that a filter selects; flows of others stay.
func (l flowLists) Flush(by datapath.Filter) (int, error) {
	flows, err := l.list(l.ctx, conntrack.Filter{Sources: l.sources, Translated: true, AnyZone: true})
	if err != nil {
		return 0, fmt.Errorf("list flows: %w", err)
	}
	by.All = false
	n, err := l.end(l.ctx, slices.DeleteFunc(flows, func(f conntrack.Flow) bool { _, ok := l.selects(f, by); return !ok }))
	if err != nil {
		return n, fmt.Errorf("end flows: %w", err)
	}
	return n, nil
}
