package datapath

import (
	"encoding/binary"
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// ingress lets a frame arrive, and tells whether it was translated. Nothing is ever dropped there but a
// fragment of SCTP.
func (w *world) ingress(frame []byte) bool {
	w.t.Helper()
	frame, v, ok := w.unpadded(frame)
	if refused(frame) {
		return false
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
		w.clocks.touch(reverseClock, v.arriving(), v) // it is a packet of the flow
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

// unpadded is a frame without padding behind a first fragment: that is cut off if held fragments follow
// (hold.h), and headers may be read from it.
func (w *world) unpadded(frame []byte) ([]byte, wire, bool) {
	v, ok := viewFrame(w.link, frame)
	if ok && v.first && v.end < len(frame) {
		frame = frame[:v.end]
		v, ok = viewFrame(w.link, frame)
	}
	return frame, v, ok
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
