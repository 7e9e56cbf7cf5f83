package datapath

import (
	"encoding/binary"
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

// end forgets the flows of the execution.
func (w *world) end() {
	if w.clocks != nil && !w.t.Failed() {
		w.checkClocks()
	}
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

// egress lets a frame leave and checks all that must hold whatever the frame is. It
// returns what came out, if it was translated.
func (w *world) egress(frame []byte) (out wire, ok bool) {
	w.t.Helper()
	if refused(frame) {
		return wire{}, false
	}
	v, ok := viewFrame(w.link, frame)
	reopens := ok && w.reopens(v)
	res := w.run(egress, w.dev, w.link, frame)
	if ok {
		w.note(v)
		w.fragment(egress, v, res)
		w.nodeFirst(v)
	}
	switch {
	case res.outcome.Verdict() == policy.Drop:
		w.egressDropped(frame, res, v, ok)
	case res.outcome.Verdict() == policy.Hold:
		w.failf(egress, frame, res, "only what arrives may be held")
	case res.outcome.Verdict() == policy.Pass:
		w.egressPassed(frame, res, v, ok)
	case !ok:
		w.failf(egress, frame, res, "an unreadable packet was translated")
	default:
		w.egressTranslated(res, v)
		if reopens {
			w.reopened(v, res)
		}
		return viewIP(res.data, v.l3, v.is4, false)
	}
	return wire{}, false
}

func (w *world) note(v wire) {
	w.seen = append(w.seen, v)
	if v.first || v.later {
		w.noted = true
	}
}

// isHost tells whether an address is the node's own.
func (w *world) isHost(a netip.Addr) bool { return slices.Contains(w.policy.Input().HostAddrs, a) }

func (w *world) egressDropped(frame []byte, res result, v wire, ok bool) {
	w.t.Helper()
	if !ok {
		if res.outcome != policy.DropBadHeader {
			w.failf(egress, frame, res, "want %s", policy.DropBadHeader)
		}
		return
	}
	d := w.decide(v)
	if d.Outcome.Verdict() == policy.Pass && d.Outcome != policy.PassDevice && d.Outcome != policy.PassProtocol && !w.strayReset(res, v) {
		w.failf(egress, frame, res, "want %s", d.Outcome)
	}
	switch res.outcome {
	case policy.DropRewrite, policy.DropMapError, policy.DropNoPolicy, policy.DropRate:
		w.failf(egress, frame, res, "never for want of anything")
	case policy.DropQuota:
		w.refused = true
		n := 0
		for f := range w.forward {
			if f.local.Addr() == v.src {
				n++
			}
		}
		if w.choice.quota == 0 || n < w.choice.quota {
			w.failf(egress, frame, res, "%d flows of the pod", n)
		}
	case policy.DropNoPort:
		w.refused = true
		if n := w.free(v, d.Address); n > 0 && v.proto != packet.SCTP {
			w.failf(egress, frame, res, "%d ports are free", n)
		}
	case policy.DropTableFull:
		n := w.host
		for f := range w.forward {
			if f.local.Addr().Is4() == v.is4 {
				n++
			}
		}
		if n < fuzzFlows {
			w.failf(egress, frame, res, "%d flows of %d", n, fuzzFlows)
		}
	}
	if _, known := w.forward[v.leaving()]; known && !v.hidden && !v.later && !v.error() {
		w.failf(egress, frame, res, "it belongs to a mapping")
	}
}

// strayReset tells whether a bare RST of the node was dropped, which no socket of its own sent: it
// would end a pod's connection whose mapping was lost.
func (w *world) strayReset(res result, v wire) bool {
	const flags = packet.SYN | packet.FIN | packet.RST | packet.ACK
	return res.outcome == policy.DropStray && w.isHost(v.src) && v.proto == packet.TCP && v.decidable(0).TCPFlags&flags == packet.RST
}

// nodeFirst forgets the mapping that a packet without ports ends: the node comes before any pod.
func (w *world) nodeFirst(v wire) {
	if !w.isHost(v.src) || v.later || v.ports() || v.icmp() {
		return
	}
	if inner, ok := w.reverse[v.leaving()]; ok {
		delete(w.reverse, v.leaving())
		delete(w.forward, flowOf{v.proto, inner, v.leaving().remote})
	}
}

// free counts the ports of the pool that no flow has towards the remote of v.
func (w *world) free(v wire, external netip.Addr) int {
	if !v.ports() {
		return 0
	}
	n := -w.host
	for _, port := range w.ports {
		f := v.leaving()
		f.local = netip.AddrPortFrom(external, port)
		if _, taken := w.reverse[f]; !taken {
			n++
		}
	}
	return n
}

// egressPassed: what leaves as it is must be allowed to.
func (w *world) egressPassed(frame []byte, res result, v wire, ok bool) {
	w.t.Helper()
	if !ok {
		if res.outcome != policy.PassNotIP || isIP(w.link, frame) {
			w.failf(egress, frame, res, "an unreadable packet left")
		}
		return
	}
	if w.isHost(v.src) {
		w.host++
	}
	d := w.decide(v)
	if _, known := w.forward[v.leaving()]; known && !v.hidden && !v.later && !v.error() {
		w.failf(egress, frame, res, "it belongs to a mapping")
	}
	if res.outcome == d.Outcome {
		return
	}
	switch res.outcome {
	case policy.PassInbound:
		f := v.leaving()
		if q, ok := v.quote(); v.error() && ok {
			f = q.arriving()
		}
		if d.Outcome.Verdict() == policy.Pass && d.Outcome != policy.PassDevice && d.Outcome != policy.PassProtocol {
			break
		}
		if q, ok := v.quote(); v.error() && ok && v.dst != q.src {
			w.failf(egress, frame, res, "an error for %s about a packet of %s", v.dst, q.src)
		}
		if w.inbound[f] && !v.decidable(0).Opening() || v.later && len(w.inbound) > 0 {
			w.clocks.answers(v)
			return
		}
	case policy.PassProtocol:
		if v.later && w.choice.unknown == policy.UnknownPass {
			return
		}
	case policy.PassTranslated:
		// The node's own socket is a mapping's, or it answers a mapped flow.
		_, answered := w.forward[v.arriving()]
		if q, ok := v.quote(); v.error() && ok && v.dst == q.src {
			_, answered = w.forward[q.leaving()] // or is an error about one, for the inner host
		}
		if w.isHost(v.src) || answered {
			return
		}
	case policy.PassHost:
		if v.error() && w.isHost(v.src) {
			return
		}
	}
	w.failf(egress, frame, res, "left as it is, want %s", d.Outcome)
}

func (w *world) egressTranslated(res result, v wire) {
	w.t.Helper()
	out, ok := viewIP(res.data, v.l3, v.is4, false)
	if !ok {
		w.failf(egress, v.frame, res, "unreadable now")
	}
	parts := []rewritten{{wire: v, side: sideSource, addrOnly: v.later || v.error(), limit: len(v.frame)}}
	if v.error() {
		q, ok := v.quote()
		if !ok || q.hidden || q.later || !q.intact() {
			w.failf(egress, v.frame, res, "the quote names no flow")
		}
		parts = append(parts, rewritten{wire: q, side: sideDestination, limit: v.end})
	}
	if err := checkRewrite(res.data, parts...); err != nil {
		w.failf(egress, v.frame, res, "%v", err)
	}
	d := w.decide(v)
	now := netip.AddrPortFrom(out.src, out.port(sideSource))
	known, isKnown := w.forward[v.leaving()]
	switch res.outcome {
	case policy.MasqNew:
		if isKnown || v.hidden || v.later || v.error() || d.Outcome != policy.MasqNew || d.Address != out.src {
			w.failf(egress, v.frame, res, "want %s %s, known %v", d.Outcome, d.Address, known)
		}
		if v.ports() && !slices.Contains(w.ports, now.Port()) && (v.proto != packet.SCTP || now.Port() != v.port(sideSource)) {
			w.failf(egress, v.frame, res, "port %d is not of the pool", now.Port())
		}
		rev := v.leaving()
		rev.local = now
		if other, taken := w.reverse[rev]; taken {
			w.failf(egress, v.frame, res, "the external socket is that of %s", other)
		}
		w.forward[v.leaving()], w.reverse[rev] = now, v.leaving().local
		w.sent = append(w.sent, out)
		w.clocks.touch(forwardClock, v.leaving(), v)
		w.clocks.touch(reverseClock, rev, v)
	case policy.MasqKnown:
		if !isKnown || known != now {
			w.failf(egress, v.frame, res, "want %s", known)
		}
		w.clocks.touch(forwardClock, v.leaving(), v)
		w.sent = append(w.sent, out)
	case policy.MasqHost:
		if !w.isHost(v.src) || out.src != v.src {
			w.failf(egress, v.frame, res, "not the node's")
		}
		w.host++
	case policy.MasqFragment:
		if !v.later || !w.isHost(out.src) {
			w.failf(egress, v.frame, res, "not a later fragment from a masquerade address")
		}
	case policy.MasqError:
		w.egressError(res, v, out)
	default:
		w.failf(egress, v.frame, res, "not a translation of egress")
	}
}

// egressError: the quote of an error is what the remote had sent.
func (w *world) egressError(res result, v, out wire) {
	w.t.Helper()
	q, _ := v.quote()
	now, ok := out.quote()
	if !ok || !v.error() || v.redirect() && !w.isHost(v.src) {
		w.failf(egress, v.frame, res, "not an error that a pod may send")
	}
	want, known := w.forward[q.arriving()]
	if got := now.arriving().local; (!known || got != want) && (w.host == 0 || !w.isHost(q.dst)) {
		w.failf(egress, v.frame, res, "the quote is to %s, want %s", got, want)
	}
	if !w.isHost(out.src) {
		w.failf(egress, v.frame, res, "from %s", out.src)
	}
}

// ingress lets a frame arrive, and tells whether it was translated. Nothing is ever dropped there but a
// fragment of SCTP.
func (w *world) ingress(frame []byte) bool {
	w.t.Helper()
	if refused(frame) {
		return false
	}
	v, ok := viewFrame(w.link, frame)
	if ok && v.first && v.end < len(frame) {
		// Padding behind it is cut off if held fragments follow (hold.h): have none.
		frame = frame[:v.end]
		if v, ok = viewFrame(w.link, frame); refused(frame) {
			return false
		}
	}
	res := w.run(ingress, w.dev, w.link, frame)
	if ok {
		w.note(v)
		w.fragment(ingress, v, res)
	}
	switch {
	case res.outcome == policy.DropFragment && v.first && v.proto == packet.SCTP:
		// Its CRC can't be corrected for another port (decision 13).
		if _, known := w.reverse[v.arriving()]; !known && w.host == 0 {
			w.failf(ingress, frame, res, "dropped, and of no mapping")
		}
	case res.outcome == policy.DropFragment && v.later && w.notes[noteKey(ingress, v)].outcome == res.outcome:
	case res.outcome.Verdict() == policy.Drop, res.outcome.Verdict() == policy.Hold && !v.later:
		w.failf(ingress, frame, res, "dropped")
	case res.outcome.Verdict() == policy.Masquerade && !ok:
		w.failf(ingress, frame, res, "an unreadable packet was translated")
	case res.outcome.Verdict() == policy.Masquerade:
		w.ingressTranslated(res, v)
		return true
	case res.outcome.Verdict() == policy.Hold:
		w.held = true
	case ok:
		w.ingressPassed(res, v)
	}
	return false
}

func (w *world) ingressPassed(res result, v wire) {
	w.t.Helper()
	query, _ := v.echo()
	if inner, known := w.reverse[v.arriving()]; known && !v.hidden && !v.later && !v.error() && !query && (!v.icmp() || v.portAt(sideDestination) >= 0) {
		w.failf(ingress, v.frame, res, "it belongs to the mapping of %s", inner)
	}
	if res.outcome == policy.PassInbound {
		w.inbound[v.arriving()] = true
		w.clocks.touch(inboundClock, v.arriving(), v)
	}
}

func (w *world) ingressTranslated(res result, v wire) {
	w.t.Helper()
	out, ok := viewIP(res.data, v.l3, v.is4, false)
	if !ok {
		w.failf(ingress, v.frame, res, "unreadable now")
	}
	parts := []rewritten{{wire: v, side: sideDestination, addrOnly: v.later || v.error(), limit: len(v.frame)}}
	if v.error() {
		q, ok := v.quote()
		if !ok || q.hidden || q.later || !q.intact() || v.redirect() {
			w.failf(ingress, v.frame, res, "it names no flow")
		}
		parts = append(parts, rewritten{wire: q, side: sideSource, limit: v.end})
	}
	if err := checkRewrite(res.data, parts...); err != nil {
		w.failf(ingress, v.frame, res, "%v", err)
	}
	inner, known := w.reverse[v.arriving()]
	switch res.outcome {
	case policy.MasqKnown:
		if got := out.arriving().local; !known || got != inner {
			w.failf(ingress, v.frame, res, "to %s, want %s", got, inner)
		}
		w.clocks.touch(reverseClock, v.arriving(), v)
	case policy.MasqHost:
		if w.host == 0 || !w.isHost(out.dst) {
			w.failf(ingress, v.frame, res, "not for the node")
		}
	case policy.MasqFragment:
		if !v.later {
			w.failf(ingress, v.frame, res, "not a later fragment")
		}
	case policy.MasqError:
		q, _ := v.quote()
		now, ok := out.quote()
		inner, known := w.reverse[q.leaving()]
		if !ok || !v.error() || w.host == 0 && (!known || now.leaving().local != inner || out.dst != inner.Addr()) {
			w.failf(ingress, v.frame, res, "the error is for %s about %s, want %s", out.dst, now.leaving().local, inner)
		}
	default:
		w.failf(ingress, v.frame, res, "not a translation of ingress")
	}
}

// answer turns a frame that left round: addresses and ports swapped, which leaves every checksum
// as right as it was. ok is false if nobody answers such a packet.
func answer(v wire) (frame []byte, ok bool) {
	b := slices.Clone(v.frame)
	swap := func(a0, a1, b0, b1 int) {
		tmp := slices.Clone(b[a0:a1])
		copy(b[a0:a1], b[b0:b1])
		copy(b[b0:b1], tmp)
	}
	s0, s1 := v.addrAt(sideSource)
	d0, d1 := v.addrAt(sideDestination)
	swap(s0, s1, d0, d1)
	query, _ := v.echo()
	switch {
	case v.later, v.hidden, v.error():
		return nil, false
	case v.ports():
		swap(v.l4, v.l4+2, v.l4+2, v.l4+4)
		if v.proto == packet.SCTP && v.end >= v.l4+12 { // its CRC minds the order
			crc := binary.LittleEndian.Uint32(b[v.l4+8:])
			binary.LittleEndian.PutUint32(b[v.l4+8:], crc^crcRest(b[v.l4:v.end])^crcRest(v.frame[v.l4:v.end]))
		}
	case query:
		// The answer's type, and what that does to the checksum.
		was := uint16(b[v.l4]) << 8
		b[v.l4] = map[byte]byte{8: 0, 13: 14, 128: 129}[b[v.l4]]
		sum := packet.Sum(^binary.BigEndian.Uint16(b[v.l4+2:]), []byte{byte(^was >> 8), byte(^was), b[v.l4], 0})
		binary.BigEndian.PutUint16(b[v.l4+2:], ^sum)
	case v.icmp():
		return nil, false
	}
	return b, true
}

// back lets the answer to what left translated arrive: it must find its mapping.
func (w *world) back(v wire) {
	w.t.Helper()
	a, ok := answer(v)
	if !ok || refused(a) || !isIP(w.link, a) {
		return
	}
	_, mapped := w.reverse[v.leaving()]
	if got := w.ingress(a); !got && mapped {
		w.t.Fatalf("the answer found no mapping\n in %x", a)
	}
}
