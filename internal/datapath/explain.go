package datapath

import (
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Question is a packet that nobody sends.
type Question struct {
	Src, Dst netip.AddrPort // of an ICMP query the port of Src is the identifier and that of Dst is 0
	Proto    uint8          // IP protocol number; TCP: a SYN, ICMP: an echo request
	Device   int            // ifindex of the device by which it leaves
}

// Answer is what the program at egress would do with it now.
type Answer struct {
	Outcome policy.Outcome
	Source  netip.AddrPort // that the packet would leave with
	Inbound bool           // a connection opened from outside has these addresses and ports
}

// Explainer runs the real egress program on packets that nobody sends. It is a second
// instance of the same object that reads the policy, the settings and the devices in the
// live tables, but has tables of its own for everything that a program writes: flows,
// counts, quotas, notes. Before each run they get what the program could meet of the
// live flows. So nothing that is live can change, and the programs on the devices need
// no instruction for it.
type Explainer struct {
	in       *Inspector
	features Features
	shared   map[string]*ebpf.Map // by sharedPins
	live     map[string]*ebpf.Map // by copiedPins
	twin     *twin                // nil: not loaded yet
}

// sharedPins are what the egress program only reads.
var sharedPins = []string{pinControl, pinSettings, pinPolicies, pinDevices, pinTunnels}

// copiedPins are written by it: an answer begins with copies of the entries that matter.
var copiedPins = []string{pinPods, pinShares, pinRefusals}

// Explain opens the pinned data plane for questions; without lists features of the kernel
// that are not to be used, for tests. The Inspector stays the caller's.
func (i *Inspector) Explain(without ...Feature) (*Explainer, error) {
	b, err := i.maps[pinControl].LookupBytes(uint32(0))
	if err != nil {
		return nil, fmt.Errorf("read control: %w", err)
	}
	if layout, err := layoutOf(b); err != nil || layout != 0 && layout != mapLayout {
		return nil, i.otherLayout(layout)
	}
	features, err := Probe()
	if err != nil {
		return nil, err
	}
	e := &Explainer{in: i, features: features.Without(without...), shared: make(map[string]*ebpf.Map), live: make(map[string]*ebpf.Map)}
	for to, names := range map[*map[string]*ebpf.Map][]string{&e.shared: sharedPins, &e.live: copiedPins} {
		for _, name := range names {
			m, err := i.open(name)
			if err != nil {
				e.Close()
				return nil, err
			}
			(*to)[name] = m
		}
	}
	return e, nil
}

// Close lets go of everything; nothing of it was pinned.
func (e *Explainer) Close() {
	for _, maps := range []map[string]*ebpf.Map{e.shared, e.live} {
		for _, m := range maps {
			m.Close()
		}
	}
	if e.twin != nil {
		e.twin.Close()
	}
}

// Ask runs the program on the packet of q, in the network namespace of the calling thread.
func (e *Explainer) Ask(q Question) (Answer, error) {
	p := packet.Packet{
		Src: q.Src.Addr(), Dst: q.Dst.Addr(), Proto: q.Proto,
		SrcPort: q.Src.Port(), DstPort: q.Dst.Port(), Ident: q.Src.Port(), Flags: packet.SYN, Payload: make([]byte, 32),
	}
	switch q.Proto {
	case packet.ICMP:
		p.Type = 8
	case packet.ICMPv6:
		p.Type = 128
	case packet.TCP:
		p.Payload = nil
	}
	return e.ask(p, flowKey{q.Src, q.Dst, q.Proto}, q.Device)
}

// ask runs the program on any packet with an Ethernet header; key is its forward key.
func (e *Explainer) ask(p packet.Packet, key flowKey, device int) (a Answer, err error) {
	if a.Inbound, err = e.prepare(key); err != nil {
		return a, fmt.Errorf("copy the flows: %w", err)
	}
	frame := p.Build()
	opt := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: runContext{Ifindex: uint32(device)}}
	if _, err := e.twin.Egress.Run(&opt); err != nil {
		return a, fmt.Errorf("run the program: %w", err)
	}
	if a.Outcome, err = e.twin.takeOutcome(); err != nil {
		return a, err
	}
	a.Source = netip.AddrPortFrom(p.Src, p.Port())
	if a.Outcome.Verdict() == policy.Masquerade {
		a.Source = sourceIn(opt.DataOut[p.Link.Size():], p)
	}
	return a, nil
}

// runContext is struct __sk_buff (linux/bpf.h) up to the field that a run needs.
type runContext struct {
	_       [10]uint32
	Ifindex uint32
	_       [37]uint32
}

// sourceIn reads the source of an IP packet that is p but for that.
func sourceIn(b []byte, p packet.Packet) netip.AddrPort {
	var addr netip.Addr
	size := p.HeaderSize()
	if p.Src.Is4() {
		addr = netip.AddrFrom4([4]byte(b[12:]))
	} else {
		addr = netip.AddrFrom16([16]byte(b[8:]))
	}
	at := size
	switch {
	case p.IsQuery():
		at += 4 // the identifier
	case !p.HasPorts():
		return netip.AddrPortFrom(addr, 0)
	}
	return netip.AddrPortFrom(addr, uint16(b[at])<<8|uint16(b[at+1]))
}
