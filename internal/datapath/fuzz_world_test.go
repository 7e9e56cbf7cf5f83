package datapath

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// fuzzFlows is the size of the tables: so small that a few packets fill them.
const fuzzFlows = 16

// choices are the fuzzer's bytes, each of which chooses something; behind the last
// one they are zero.
type choices struct{ b []byte }

func (c *choices) byte() byte {
	if len(c.b) == 0 {
		return 0
	}
	b := c.b[0]
	c.b = c.b[1:]
	return b
}

func (c *choices) below(n int) int { return int(c.byte()) % n }

func (c *choices) port() uint16 {
	return []uint16{keptPort, changedPort, firstPort, 53, 443, 0, 65535, uint16(c.byte())<<8 | uint16(c.byte())}[c.below(8)]
}

// worlds keeps what the executions of a fuzz test share: the rig with two policies in the
// kernel, one a generation, of which each execution puts one in force.
type worlds struct {
	r        *rig
	inputs   [2]policy.Input // by generation
	policies map[worldChoice]*policy.Policy
	settings map[worldChoice]*masqSetting
	last     [2]worldChoice
	ports    []uint16 // of the pool in force
}

// worldChoice is what an execution may choose about the policy.
type worldChoice struct {
	generation uint32
	ipv4, ipv6 bool
	unknown    policy.UnknownProtocols
	pool       int
	quota      int // mappings of a pod; 0: any number
}

var fuzzPools = []int{64, 1, 2, 7}

func newWorlds(f *testing.F) *worlds {
	w := &worlds{
		r: newRigFlows(f, fuzzFlows), policies: make(map[worldChoice]*policy.Policy), settings: make(map[worldChoice]*masqSetting),
	}
	for _, dev := range []string{"eth0", "eth1"} { // where held fragments arrive again
		w.r.must(w.r.ns.SetMTU(dev, 9000))
		w.r.must(w.r.ns.SetUp(dev))
	}
	pods := w.r.familyInput()
	forwarded := w.r.familyInput()
	forwarded.Sources, forwarded.Native = nil, nil
	forwarded.Devices[1].IPv4, forwarded.Devices[1].IPv6 = netip.Addr{}, netip.Addr{}
	for _, f := range families {
		pods.NonMasq = append(pods.NonMasq, policy.Rule{Prefix: prefixOf(f.other), Origin: "test"})
		forwarded.Sources = append(forwarded.Sources, policy.Rule{Prefix: netip.PrefixFrom(f.pod, 0).Masked(), Origin: "test"})
		forwarded.NonMasq = append(forwarded.NonMasq, policy.Rule{Prefix: f.natives, Origin: "test"})
		forwarded.Nodes = append(forwarded.Nodes, policy.NodeAddr{Addr: f.router, Node: "other", Type: policy.InternalIP, Origin: "test"})
		forwarded.RouteSources = append(forwarded.RouteSources, policy.RouteSource{Prefix: prefixOf(f.other), Source: f.node2})
	}
	for _, in := range []policy.Input{pods, forwarded} {
		w.r.reapply(in)
		st, err := w.r.d.state()
		w.r.must(err)
		w.inputs[st.Active] = in
	}
	return w
}

// world is one execution: the rig with empty tables, and what is known of the flows in them.
type world struct {
	*rig
	*worlds
	t       testing.TB
	c       *choices
	choice  worldChoice
	policy  *policy.Policy
	dev     string
	link    packet.Link
	forward map[flowOf]netip.AddrPort // to the external socket
	reverse map[flowOf]netip.AddrPort // local is the external socket; to the inner one
	inbound map[flowOf]bool           // opened from outside
	host    int                       // packets of the node that may have an entry of their own
	noted   bool                      // a fragmented datagram may have been
	refused bool                      // a pod's flow was, and that is remembered
	held    bool                      // a later fragment is
	notes   map[noteOf]noteFor        // on fragmented datagrams
	clocks  *clocks                   // nil: nothing was aged
	sent    []wire                    // what left translated
	seen    []wire                    // what went into the programs
}

// begin starts an execution.
func (w *worlds) begin(t testing.TB, c *choices) *world {
	b := c.byte()
	choice := worldChoice{
		generation: uint32(b & 1), ipv4: b&0x0e != 0x0e, ipv6: b&0x0e != 0x0c,
		unknown: []policy.UnknownProtocols{policy.UnknownMasquerade, policy.UnknownDrop, policy.UnknownPass, policy.UnknownMasquerade}[b>>4&3],
		pool:    fuzzPools[b>>6],
	}
	b = c.byte()
	if b>>5 == 7 {
		choice.quota = 3
	}
	r := w.r.on(t)
	run := &world{
		rig: r, worlds: w, t: t, c: c, choice: choice, policy: w.inForce(r, choice), dev: "eth0", link: packet.Link(b & 3),
		forward: make(map[flowOf]netip.AddrPort), reverse: make(map[flowOf]netip.AddrPort), inbound: make(map[flowOf]bool),
		notes: make(map[noteOf]noteFor),
	}
	if b>>2&7 == 7 {
		run.dev = "eth1"
	}
	if choice.quota > 0 {
		r.wipe(r.d.objs.Pods) // what earlier executions counted
	}
	for _, pick := range clocked {
		if left := run.flows(pick); len(left) > 0 {
			t.Fatalf("an earlier execution left %+v", left)
		}
	}
	return run
}

// inForce puts the chosen policy in force.
func (w *worlds) inForce(r *rig, choice worldChoice) *policy.Policy {
	r.t.Helper()
	p := w.policies[choice]
	if p == nil {
		in := w.inputs[choice.generation]
		in.IPv4, in.IPv6, in.UnknownProtocols = choice.ipv4, choice.ipv6, choice.unknown
		in.Ports, in.MaxPortsPerPod = in.Ports[:choice.pool], choice.quota
		var err error
		p, err = policy.Build(in)
		r.must(err)
		s, err := renderSetting(p)
		r.must(err)
		s.Guarded = s.InPool
		w.policies[choice], w.settings[choice] = p, s
	}
	if w.last[choice.generation] != choice {
		r.must(r.d.objs.Settings.Put(choice.generation, w.settings[choice]))
		w.last[choice.generation] = choice
	}
	w.ports = p.Input().Ports
	r.state(func(st *masqState) { st.Active = choice.generation })
	for _, dev := range p.Input().Devices {
		var v masqDevice
		for i, a := range [2]netip.Addr{dev.IPv4, dev.IPv6} {
			if a.IsValid() {
				v.Addr[i] = addrTo(a)
			}
		}
		r.must(r.d.objs.Devices.Put(uint32(dev.Index), v))
	}
	return p
}

// end checks what the execution left, and forgets it.
func (w *world) end() {
	defer w.forget() // also after a failure: the fuzzer runs the same again to make it smaller
	if w.clocks != nil && !w.t.Failed() {
		w.checkClocks()
	}
}

func (w *world) forget() {
	o := &w.rig.d.objs
	for _, t := range w.rig.d.sweeper.tables {
		w.wipe(t.forward)
		w.wipe(t.reverse)
		w.wipe(t.inbound)
	}
	if w.noted {
		w.wipe(o.Fragments)
	}
	if w.refused {
		w.wipe(o.Refusals)
	}
	if w.held {
		w.emptyHeld()
	}
}

// refused tells whether a test run takes no such frame.
func refused(frame []byte) bool { return testRunRefuses(frame, len(frame)) || len(frame) > 2000 }

// failf ends the execution with a frame that went in, and what came out.
func (w *world) failf(dir direction, in []byte, res result, format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s on %s, link %d, %+v: %s: %s\n in  %x\n out %x", dir, w.dev, w.link, w.choice, res.outcome,
		fmt.Sprintf(format, args...), in, res.data)
}

// decide is what policy.Decide says of a first packet.
func (w *world) decide(v wire) policy.Decision {
	return w.policy.Decide(v.decidable(w.rig.device[w.dev]))
}

func (w *world) note(v wire) {
	w.seen = append(w.seen, v)
	if v.first || v.later {
		w.noted = true
	}
}

// isHost tells whether an address is the node's own.
func (w *world) isHost(a netip.Addr) bool { return slices.Contains(w.policy.Input().HostAddrs, a) }

// isPod tells whether an address is of the source ranges and not the node's own.
func (w *world) isPod(a netip.Addr) bool {
	return !w.isHost(a) && slices.ContainsFunc(w.policy.Input().Sources, func(r policy.Rule) bool { return r.Prefix.Contains(a) })
}
