package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
)

// fakeNode does with packets what the programs and netfilter do, one after the other.
// After each call of the switch each connection sends a packet both ways.
type fakeNode struct {
	t        *testing.T
	handover bool
	mappings map[flowKey]datapath.Flow
	entries  map[flowKey]conntrack.Flow // by whom the packets reach
	// mapping and ruling: new connections get a mapping, or are translated by a rule; tracking:
	// netfilter looks at packets.
	mapping, ruling, tracking bool

	talking []datapath.Flow // connections there are, as the remote knows them
	refuse  map[flowKey]bool
	other   []conntrack.Flow // entries of another zone
	steps   int
	crash   int            // before this step; 0: never
	packet  func(step int) // comes between two steps
}

var errCrash = errors.New("crash")

// step is each call that changes something.
func (n *fakeNode) step() error {
	n.steps++
	if n.steps == n.crash {
		return errCrash
	}
	if n.packet != nil {
		n.packet(n.steps)
	}
	n.check()
	return nil
}

// opens lets a pod open a connection: it gets the pod's own port.
func (n *fakeNode) opens(step int) {
	f := talking(1000 + step)
	f.Xlate = netip.AddrPortFrom(f.Xlate.Addr(), f.Src.Port())
	n.talking = append(n.talking, f)
}

// check lets every connection talk. Answers may be held only while a switch is at work.
func (n *fakeNode) check() {
	n.t.Helper()
	for _, f := range n.talking {
		if err := n.out(f); err != nil {
			n.t.Fatalf("step %d: %s: leaving: %v", n.steps, f, err)
		}
		if err := n.in(f, true); err != nil {
			n.t.Fatalf("step %d: %s: answer: %v", n.steps, f, err)
		}
	}
}

// settled checks that no answer is held.
func (n *fakeNode) settled() {
	n.t.Helper()
	for _, f := range n.talking {
		if err := n.in(f, false); err != nil {
			n.t.Fatalf("at the end: %s: answer: %v", f, err)
		}
	}
}

// out sends a packet of a pod: first netfilter, then the programs.
func (n *fakeNode) out(f datapath.Flow) error {
	c, known := n.entries[keyOf(f)]
	if !known && n.tracking {
		c = conntrack.Flow{Proto: f.Proto, Src: f.Src, Dst: f.Dst, Remote: f.Dst, Xlate: f.Src, State: "established"}
		if n.ruling { // a rule keeps the port
			c.Xlate = netip.AddrPortFrom(f.Xlate.Addr(), f.Src.Port())
		}
		n.entries[keyOf(f)] = c
	}
	if n.tracking && c.Xlate != c.Src {
		if c.Xlate != f.Xlate {
			return fmt.Errorf("netfilter gives it %s", c.Xlate)
		}
		for _, m := range n.mappings {
			if m.Xlate == f.Xlate && m.Dst == f.Dst && (!n.handover || m.Side == datapath.SideOurs) {
				return errors.New("the programs give it another port")
			}
		}
		return nil
	}
	m, mapped := n.mappings[keyOf(f)]
	switch {
	case mapped && m.Xlate != f.Xlate:
		return fmt.Errorf("the programs give it %s", m.Xlate)
	case !mapped && !n.mapping:
		return errors.New("it leaves with the pod's address")
	case !mapped && f.Xlate.Port() != f.Src.Port():
		return errors.New("it gets a new mapping")
	case !mapped:
		n.mappings[keyOf(f)] = f
	}
	return nil
}

// in sends an answer: first the programs, then netfilter.
func (n *fakeNode) in(f datapath.Flow, mayHold bool) error {
	c, known := n.entries[keyOf(f)]
	netfilter := n.tracking && known && c.Xlate != c.Src
	m, mapped := n.mappings[keyOf(f)]
	if mapped && n.handover && m.Side == datapath.SideHeld {
		if !mayHold {
			return errors.New("held")
		}
		return nil
	}
	if mapped && (m.Side == datapath.SideOurs || !n.handover) {
		if netfilter {
			return errors.New("netfilter takes it for a new connection")
		}
		return nil
	}
	if !netfilter {
		return errors.New("nobody translates it")
	}
	return nil
}

func (n *fakeNode) SetHandover(on bool) error {
	n.handover = on
	return n.step()
}

func (n *fakeNode) Flows(context.Context) (out []datapath.Flow, err error) {
	for _, f := range n.mappings {
		out = append(out, f)
	}
	return out, n.step()
}

func (n *fakeNode) Import(_ context.Context, flows []datapath.Flow) (int, []datapath.Refusal, error) {
	for _, f := range flows {
		if _, ok := n.mappings[keyOf(f)]; !ok {
			n.mappings[keyOf(f)] = f
		}
	}
	return len(flows), nil, n.step()
}

func (n *fakeNode) SetSide(_ context.Context, flows []datapath.Flow, side datapath.Side) (int, error) {
	for _, f := range flows {
		if m, ok := n.mappings[keyOf(f)]; ok {
			m.Side = side
			n.mappings[keyOf(f)] = m
		}
	}
	return len(flows), n.step()
}

func (n *fakeNode) Forget(_ context.Context, flows []datapath.Flow) (int, error) {
	for _, f := range flows {
		delete(n.mappings, keyOf(f))
	}
	return len(flows), n.step()
}

func (n *fakeNode) Shifted(context.Context) ([]datapath.Flow, error) { return nil, n.step() }

func (n *fakeNode) List(_ context.Context, f conntrack.Filter) (out []conntrack.Flow, err error) {
	for _, c := range n.entries {
		if !f.Translated || c.Xlate != c.Src {
			out = append(out, c)
		}
	}
	return append(out, n.other...), n.step()
}

func (n *fakeNode) Create(_ context.Context, flows []conntrack.Flow) (int, error) {
	var refused []conntrack.Refusal
	for _, c := range flows {
		if err := n.create(c); err != nil {
			refused = append(refused, conntrack.Refusal{Flow: c, Err: err})
		}
	}
	return n.result(len(flows), refused)
}

func (n *fakeNode) create(c conntrack.Flow) error {
	if _, there := n.entries[keyOfTracked(c)]; there {
		return unix.EEXIST
	}
	if n.refuse[keyOfTracked(c)] && c.Xlate != c.Src {
		return unix.EINVAL
	}
	n.entries[keyOfTracked(c)] = c
	return nil
}

func (n *fakeNode) result(flows int, refused []conntrack.Refusal) (int, error) {
	if err := n.step(); err != nil || refused == nil {
		return flows, err
	}
	return flows - len(refused), &conntrack.RefusedError{Refused: refused}
}

func (n *fakeNode) Replace(_ context.Context, flows []conntrack.Flow) (int, error) {
	var refused []conntrack.Refusal
	for _, c := range flows {
		delete(n.entries, keyOfTracked(c))
		if !n.ruling { // with rules it has to be quick: see toRules
			n.check()
			delete(n.entries, keyOfTracked(c))
		}
		if err := n.create(c); err != nil {
			refused = append(refused, conntrack.Refusal{Flow: c, Err: err})
		}
		if err := n.silently(); err != nil {
			return 0, err
		}
	}
	return n.result(len(flows), refused)
}

func (n *fakeNode) Delete(_ context.Context, flows []conntrack.Flow) (int, error) {
	for _, c := range flows {
		delete(n.entries, keyOfTracked(c))
	}
	return len(flows), n.step()
}

// silently is a step behind which no packet comes.
func (n *fakeNode) silently() error {
	n.steps++
	if n.steps == n.crash {
		return errCrash
	}
	return nil
}

// fakeSide is a starter.
type fakeSide struct {
	n            *fakeNode
	ready, start func(*fakeNode)
}

func (s fakeSide) Ready(context.Context) error { s.ready(s.n); return s.n.step() }
func (s fakeSide) Start(context.Context) error { s.start(s.n); return s.n.step() }

func (n *fakeNode) modeSwitch() *modeSwitch {
	return &modeSwitch{
		maps: n, tracked: n, batch: testBatch,
		programs: fakeSide{n, func(n *fakeNode) { n.mapping = false }, func(n *fakeNode) { n.mapping = true }},
		rules: fakeSide{n, func(n *fakeNode) { n.tracking, n.ruling = true, false },
			func(n *fakeNode) { n.tracking, n.ruling = true, true }},
	}
}

func talking(i int) datapath.Flow {
	src := netip.AddrPortFrom(netip.MustParseAddr("10.0.1.2"), uint16(1000+i))
	return datapath.Flow{
		Proto: unix.IPPROTO_TCP, Src: src, Dst: netip.MustParseAddrPort("192.0.2.2:80"), State: "established",
		Xlate: netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), uint16(40000+i)),
	}
}

const (
	testBatch   = 4
	switchFlows = 2*testBatch + 1
)

// onPrograms is a node whose connections are with the programs; netfilter tracks some of
// them for kube-proxy, if tracking.
func onPrograms(t *testing.T, tracking bool) *fakeNode {
	n := &fakeNode{t: t, mappings: make(map[flowKey]datapath.Flow), entries: make(map[flowKey]conntrack.Flow), mapping: true, tracking: tracking}
	for i := range switchFlows {
		f := talking(i)
		n.talking, n.mappings[keyOf(f)] = append(n.talking, f), f
	}
	n.check()
	return n
}

// onRules is one whose connections are with netfilter.
func onRules(t *testing.T) *fakeNode {
	n := onPrograms(t, false)
	n.mappings = make(map[flowKey]datapath.Flow)
	n.mapping, n.tracking, n.ruling = false, true, true
	for _, f := range n.talking {
		n.entries[keyOf(f)] = described(f, conntrack.Flow{})
	}
	n.check()
	return n
}

func (n *fakeNode) isOnRules() {
	n.t.Helper()
	n.settled()
	if len(n.mappings) != 0 || n.mapping || !n.ruling {
		n.t.Errorf("%d mappings, mapping %t, ruling %t", len(n.mappings), n.mapping, n.ruling)
	}
}

func (n *fakeNode) isOnPrograms() {
	n.t.Helper()
	n.settled()
	for _, c := range n.entries {
		if c.Xlate != c.Src {
			n.t.Errorf("netfilter translates %s", c)
		}
	}
	if len(n.mappings) != len(n.talking) || !n.mapping || n.ruling || n.handover {
		n.t.Errorf("%d mappings, mapping %t, ruling %t, handover %t", len(n.mappings), n.mapping, n.ruling, n.handover)
	}
}
