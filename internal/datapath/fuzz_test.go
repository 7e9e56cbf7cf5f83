package datapath

import (
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
)

// The fuzz tests run the programs, by BPF_PROG_TEST_RUN, on packets and states of the tables that
// the fuzzer chooses. What must hold of every packet, in fuzz_world_test.go:
//
//   - exactly one counter moves, the verdict is that of its name, a pass changes no byte;
//   - what leaves as it is may do so: the reason is the one of policy.Decide, or one that the
//     flows known allow;
//   - a translation changes addresses, ports and checksums and nothing else; each checksum is
//     right or wrong by the same difference as before; UDP's zero stays zero;
//   - a known flow keeps its external socket, and no two share one; its answers find their way
//     back; an error's quote is what the other side knows;
//   - a later fragment gets what the first of its own datagram got; a new connection on an old mapping
//     starts it anew; packets keep a flow, errors and fragments do not (fuzz_state_test.go);
//   - no-port and table-full are true; nothing is dropped at ingress but a fragment of SCTP.
//
// An ordinary test run executes the seeds and what testdata/fuzz has.

// kindsOfAll are the packets that a fuzz test varies, of both families.
var kindsOfAll = [2][]kind{families[0].kinds(), families[1].kinds()}

// packet chooses a packet of a pod, or of somebody else.
func (w *world) packet() packet.Packet {
	c := w.c
	b := c.byte()
	fam := int(b & 1)
	f := families[fam]
	p := kindsOfAll[fam][int(b>>1)%len(kindsOfAll[fam])].p
	p.Link = w.link
	p.Src = []netip.Addr{f.pod, f.pod, f.pod2, f.foreign, f.gateway, f.node, f.other, f.pod}[c.below(8)]
	p.Dst = []netip.Addr{f.remote, f.remote, f.other, f.excluded, f.router, f.node2, f.pod2, multicastOf(f)}[c.below(8)]
	if c.below(2) == 1 {
		p = p.From(p.Src, c.port()).To(p.Dst, c.port())
		p.Ident = c.port()
	}
	if p.Proto == packet.TCP && c.below(2) == 1 {
		p.Flags = c.byte()
	}
	n := c.below(8)
	if n > 0 && n < 4 {
		p.Payload = slices.Repeat([]byte{[]byte{0, 0xff, c.byte()}[n-1]}, c.below(48))
	}
	if p.Link == packet.Raw {
		p.Payload = append(p.Payload, make([]byte, 14)...) // what a test run takes for the IP header is complete
	}
	p.ID = uint32(c.below(3))
	switch n {
	case 4: // the checksum comes out as zero,
		p.Payload = zeroChecksum(p, p)
	case 5: // or that of the translated packet does,
		p.Payload = zeroChecksum(p, p.From(f.node, p.Port()))
	case 6: // with another port
		p.Payload = zeroChecksum(p, p.From(f.node, firstPort))
	}
	return p
}

// zeroChecksum returns a payload for p with which the transport checksum of as is zero; as differs
// from p by its source alone.
func zeroChecksum(p, as packet.Packet) []byte {
	as.Link, as.Payload = packet.Raw, make([]byte, max(2, len(p.Payload)))
	b := as.Build()
	v, ok := viewIP(b, 0, as.Src.Is4(), false)
	if at := v.checksumAt(); ok && at >= 0 {
		copy(as.Payload, b[at:at+2])
	}
	return as.Payload
}

func multicastOf(f family) netip.Addr {
	if f.name == "IPv4" {
		return netip.MustParseAddr("224.0.0.251")
	}
	return netip.MustParseAddr("ff02::fb")
}

// spoil cuts a frame or changes some of its bytes, if the fuzzer likes.
func (w *world) spoil(frame []byte) []byte {
	c := w.c
	b := c.byte()
	if b&1 != 0 && len(frame) > 0 {
		frame = frame[:len(frame)-c.below(min(len(frame), 256))]
	}
	if b&2 != 0 {
		for range 1 + c.below(4) {
			if at := c.below(256); at < len(frame) {
				frame[at] = c.byte()
			}
		}
	}
	if b&4 != 0 { // padding of the link layer
		frame = append(frame, slices.Repeat([]byte{0xa5}, c.below(48))...)
	}
	return frame
}

// chooseView returns one of those seen, or nothing.
func (w *world) chooseView(from []wire) (wire, bool) {
	if len(from) == 0 {
		return wire{}, false
	}
	return from[len(from)-1-w.c.below(len(from))], true
}

// anError chooses an ICMP error about a packet: leaving about one that arrived, or the
// other way round. Its quote is cut anywhere.
func (w *world) anError(about wire, leaving bool) []byte {
	return w.spoil(w.errorAbout(about, leaving).Build())
}

func (w *world) errorAbout(about wire, leaving bool) packet.Packet {
	c := w.c
	f := families[0]
	if !about.is4 {
		f = families[1]
	}
	quote := about.frame[about.l3:]
	if b := c.byte(); b != 0 {
		quote = quote[:min(len(quote), 20+int(b)%128)]
	}
	e := packet.Packet{Link: w.link, Src: f.router, Dst: about.src, Proto: f.icmp, Payload: slices.Clone(quote), Rest: uint32(c.byte())}
	if leaving {
		at := c.below(5)
		e.Src = []netip.Addr{about.dst, f.gateway, f.node, f.pod2, about.dst}[at]
		if at == 4 {
			e.Dst = f.other // who has nothing to do with it
		}
	}
	types := f.icmpErrors()
	if about.is4 {
		types = append(types, [2]uint8{5, 1}) // a redirect
	}
	kind := types[c.below(len(types))]
	e.Type, e.Code = kind[0], kind[1]
	return e
}

// step lets something happen.
func (w *world) step() {
	w.t.Helper()
	c := w.c
	switch c.below(13) {
	case 0, 1: // a packet leaves
		if out, ok := w.egress(w.spoil(w.packet().Build())); ok && c.below(2) == 1 {
			w.back(out)
		}
	case 2: // one arrives for whoever
		p := w.packet()
		p.Src, p.Dst = p.Dst, p.Src
		w.ingress(w.spoil(p.Build()))
	case 3: // an answer, or a packet that opens a connection from outside
		w.ingress(w.spoil(w.packet().Reply().Build()))
	case 4: // the same again
		if v, ok := w.chooseView(w.seen); ok {
			w.egress(v.frame)
		}
	case 5: // an answer to what left
		if v, ok := w.chooseView(w.sent); ok {
			if a, ok := answer(v); ok {
				w.ingress(w.spoil(a))
			}
		}
	case 6: // an error about what left
		if v, ok := w.chooseView(w.sent); ok {
			w.ingress(w.anError(v, false))
		}
	case 7: // an error about what arrived, whatever became of it
		if v, ok := w.chooseView(w.seen); ok {
			if a, ok := answer(v); ok {
				// As the pod that sent v would have got the answer.
				q, _ := viewIP(a, v.l3, v.is4, false)
				w.egress(w.anError(q, true))
			}
			w.egress(w.anError(v, true))
		}
	case 8: // fragments leave, in an order of the fuzzer's
		w.fragments(w.egressOnly)
	case 9: // fragments arrive
		w.fragments(w.ingressOnly)
	case 10: // the answer to what leaves arrives in fragments
		w.fragmentedAnswer()
	case 11: // or an error about it, or about its answer
		w.fragmentedErrors()
	case 12: // time passes
		w.grow()
	}
}

func (w *world) egressOnly(frame []byte)  { w.egress(frame) }
func (w *world) ingressOnly(frame []byte) { w.ingress(frame) }

func (w *world) fragments(run func([]byte)) {
	c := w.c
	p := w.packet()
	if c.below(2) == 1 {
		p = p.Reply()
	}
	w.inPieces(p, run)
}

// inPieces runs some of the fragments of p, in an order of the fuzzer's.
func (w *world) inPieces(p packet.Packet, run func([]byte)) {
	c := w.c
	p.Payload = append(p.Payload, make([]byte, 64)...)
	p.Extensions = slices.DeleteFunc(slices.Clone(p.Extensions), func(x packet.Extension) bool { return x.Proto == packet.Fragment })
	pieces := p.Fragments(8 * (1 + c.below(12)))
	for range 4 {
		run(w.spoil(slices.Clone(pieces[c.below(len(pieces))])))
	}
}

// fragmentedAnswer lets a packet leave and its answer come back in pieces.
func (w *world) fragmentedAnswer() {
	p := w.packet()
	w.egress(p.Build())
	if len(w.seen) == 0 {
		return
	}
	if external, ok := w.forward[w.seen[len(w.seen)-1].leaving()]; ok {
		w.inPieces(p.From(external.Addr(), external.Port()).Reply(), w.ingressOnly)
	}
}

// fragmentedErrors lets a packet leave, and errors about it and its answer pass in pieces.
func (w *world) fragmentedErrors() {
	out, ok := w.egress(w.packet().Build())
	if !ok {
		return
	}
	inner := w.seen[len(w.seen)-1]
	e := w.errorAbout(out, false)
	e.ID = uint32(w.c.below(3))
	w.inPieces(e, w.ingressOnly)
	if a, ok := answer(inner); ok {
		q, _ := viewIP(a, out.l3, out.is4, false)
		e := w.errorAbout(q, true)
		e.ID = uint32(w.c.below(3))
		w.inPieces(e, w.egressOnly)
	}
}

// fuzz runs f with the bytes of the fuzzer as choices; with a frame for those that take one.
func fuzz(f *testing.F, run func(w *world, frame []byte)) {
	w := newWorlds(f)
	f.Fuzz(func(t *testing.T, setup, frame []byte) {
		c := &choices{setup}
		x := w.begin(t, c)
		defer x.end()
		for range min(len(setup)/4, 4) {
			x.step()
		}
		run(x, slices.Clone(frame))
	})
}

// setups are beginnings of executions: the policy, the link, and what happens before.
func setups(link packet.Link) [][]byte {
	return [][]byte{
		{0, byte(link)},
		{1, byte(link), 0, 0, 0, 0, 0, 0},
		{0x71, byte(link) | 7<<2, 3, 2, 0, 0, 0, 0},
	}
}

// FuzzEgress lets any frame leave, and what it becomes come back.
func FuzzEgress(f *testing.F) {
	for _, fam := range families {
		for i, k := range fam.kindsOnLinks() {
			s := setups(k.p.Link)
			f.Add(s[i%len(s)], k.p.Build())
			if k.p.Port() != 0 {
				f.Add(s[(i+1)%len(s)], k.p.From(fam.pod, changedPort).Build())
			}
		}
		for _, p := range fam.zeroChecksums() {
			f.Add([]byte{0x40, byte(packet.Ethernet)}, p.Build()) // a pool of one port
		}
		for _, k := range fam.large() {
			for _, piece := range k.p.Fragments(fragmentSize)[:2] {
				f.Add(setups(packet.Ethernet)[0], piece)
			}
		}
	}
	fuzz(f, func(w *world, frame []byte) {
		if out, ok := w.egress(frame); ok {
			w.back(out)
			w.egress(frame)
		}
	})
}

// FuzzIngress lets any frame arrive, and then the same leave.
func FuzzIngress(f *testing.F) {
	for _, fam := range families {
		for i, k := range fam.kindsOnLinks() {
			s := setups(k.p.Link)
			f.Add(s[i%len(s)], k.p.Reply().Build())
		}
		f.Add(setups(packet.Ethernet)[1], fam.unreachable(fam.udp().From(fam.node, keptPort), fam.router).Build())
	}
	fuzz(f, func(w *world, frame []byte) {
		w.ingress(frame)
		w.ingress(frame)
		if v, ok := viewFrame(w.link, frame); ok {
			if a, ok := answer(v); ok {
				w.egress(a)
			}
		}
	})
}

// FuzzICMPError lets errors pass in both directions about flows that there are: the fuzzer's
// bytes choose the flow, the error, and where the quote is cut and spoiled.
func FuzzICMPError(f *testing.F) {
	for fam := range families {
		for i := range kindsOfAll[fam] {
			for _, cut := range []byte{0, 28, 48, 60} {
				f.Add([]byte{0, byte(i % 4)}, []byte{byte(i<<1 | fam), 0, 0, 0, 0, 0, 0, 0, cut, 0, 1, 0, cut, 0, 0, 1, 0})
			}
		}
	}
	for _, seed := range errorSeeds() {
		f.Add([]byte{0, byte(packet.Ethernet)}, seed)
		f.Add([]byte{0x40, byte(packet.Ethernet)}, seed) // a pool of one port
	}
	fuzz(f, func(w *world, frame []byte) {
		w.c.b = frame
		w.errors()
	})
}

func (w *world) errors() {
	p := w.packet()
	out, ok := w.egress(p.Build())
	if !ok {
		return
	}
	inner := w.seen[len(w.seen)-1]
	w.ingress(w.anError(out, false))
	if a, ok := answer(inner); ok { // as p's sender gets it
		q, _ := viewIP(a, out.l3, out.is4, false)
		w.egress(w.anError(q, true))
	}
}

// FuzzSequence lets many packets of flows that meet pass in any order.
func FuzzSequence(f *testing.F) {
	for fam := range families {
		for i := range kindsOfAll[fam] {
			one := []byte{0, byte(i<<1 | fam), 0, 0, 0, 0, 0, 0, 0, 1}
			f.Add([]byte{byte(i << 6), byte(i)}, slices.Concat(one, []byte{5, 0, 0, 6, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 8}, one[1:], []byte{9}, one[1:]))
		}
	}
	for _, seed := range sequences() {
		f.Add([]byte{0, byte(packet.Ethernet)}, seed)
	}
	// Many flows of one pod: the pool and the tables come to an end.
	for _, setup := range [][]byte{{0, 0}, {0x40, 0}, {0x81, 1}} {
		var many []byte
		for i := range byte(24) {
			many = append(many, 0, 4, 0, 0, 1, 7, 9, i, 3, 3, 0, 0, 0, 0)
		}
		f.Add(setup, many)
	}
	fuzz(f, func(w *world, frame []byte) {
		w.c.b = frame
		for n := 0; n < 40 && len(w.c.b) > 0; n++ {
			w.step()
		}
	})
}
