package datapath

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"bauta.dev/bauta/internal/policy"
)

// routeSources are the distinct source addresses of routes, in the order of the
// routes. The programs know them by number, from 1 on.
func routeSources(p *policy.Policy) []netip.Addr {
	var out []netip.Addr
	for _, r := range p.RouteSources() {
		if r.Source.IsValid() && !slices.Contains(out, r.Source) {
			out = append(out, r.Source)
		}
	}
	return out
}

func renderSetting(p *policy.Policy) (*masqSetting, error) {
	in := p.Input()
	now, err := monotonic()
	if err != nil {
		return nil, err
	}
	s := &masqSetting{
		Ports: uint32(len(in.Ports)), Privileged: uint32(privileged(in.Ports)), Routes: uint32(len(p.RouteSources())),
		MaxFlows: uint32(in.MaxPortsPerPod), Since: uint64(now),
	}
	if n := in.NewFlowsPerPod; n > 0 {
		s.FlowInterval = uint32(time.Second / time.Duration(n))
	}
	sources := routeSources(p)
	if len(sources) >= len(s.Source) {
		return nil, fmt.Errorf("routes: %d different source addresses, the limit is %d", len(sources), len(s.Source)-1)
	}
	for i, a := range sources {
		s.Source[i+1] = addrTo(a)
	}
	for i, on := range [2]bool{in.IPv4, in.IPv6} {
		if on {
			s.Enabled[i] = 1
		}
	}
	switch in.UnknownProtocols {
	case policy.UnknownDrop:
		s.UnknownProtocols = 1
	case policy.UnknownPass:
		s.UnknownProtocols = 2
	}
	s.Timeout = renderTimers(in.Timeouts)
	copy(s.Port[:], in.Ports)
	for _, port := range in.Ports {
		s.InPool[port/64] |= 1 << (port % 64)
	}
	s.Stride[0] = strides(len(in.Ports) - privileged(in.Ports))
	s.Stride[1] = strides(privileged(in.Ports))
	return s, nil
}

// privileged counts the ports below 1024. They come first in a pool, and are for
// sources below 1024 alone.
func privileged(pool []uint16) int {
	n, _ := slices.BinarySearch(pool, 1024)
	return n
}

// renderTimers gives seconds in the order of enum timer.
func renderTimers(t policy.Timeouts) (out [7]uint32) {
	for i, d := range [...]time.Duration{t.TCPSyn, t.TCPEstablished, t.TCPClosing, t.UDP, t.UDPStream, t.ICMP, t.Other} {
		out[i] = uint32(d / time.Second)
	}
	return out
}

// strides are steps through a pool of n ports that have no divisor in common with
// n, so that a walk visits every port. They depend on n alone: a socket finds its
// ports again after all state is lost.
func strides(n int) (out [64]uint32) {
	if n < 2 {
		return out
	}
	for k := range out {
		// The golden ratio spreads them over the pool.
		step := uint32(uint64(k+1)*0x9e3779b9%uint64(n-1)) + 1
		for gcd(step, uint32(n)) != 1 {
			step = step%uint32(n-1) + 1
		}
		out[k] = step
	}
	return out
}

func gcd(a, b uint32) uint32 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// guardOldPools marks the ports of this pool and of all earlier ones: mappings
// outlive a change of the pool, and the node's packets must go on minding them.
func (d *Datapath) guardOldPools(s *masqSetting) error {
	s.Guarded = s.InPool
	if d.old != nil {
		for i, w := range d.old.guarded {
			s.Guarded[i] |= w
		}
	}
	st, err := d.state()
	if err != nil || st.Active == noGeneration {
		return err
	}
	var old masqSetting
	if err := d.objs.Settings.Lookup(tableSet(st.Active), &old); err != nil {
		return fmt.Errorf("read settings: %w", err)
	}
	for i, w := range old.Guarded {
		s.Guarded[i] |= w
	}
	return nil
}
