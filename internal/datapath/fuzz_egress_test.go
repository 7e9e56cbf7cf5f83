package datapath

import (
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// egress lets a frame leave and checks all that must hold whatever the frame is. It
// returns what came out, if it was translated.
func (w *world) egress(frame []byte) (out wire, ok bool) {
	w.t.Helper()
	frame, v, ok := w.unpadded(frame)
	if refused(frame) {
		return wire{}, false
	}
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

func (w *world) egressDropped(frame []byte, res result, v wire, ok bool) {
	w.t.Helper()
	if !ok {
		if res.outcome != policy.DropBadHeader {
			w.failf(egress, frame, res, "want %s", policy.DropBadHeader)
		}
		return
	}
	d := w.decide(v)
	if d.Outcome.Verdict() == policy.Pass && d.Outcome != policy.PassDevice && d.Outcome != policy.PassProtocol &&
		!w.strayReset(res, v) && !(res.outcome == policy.DropFragment && w.showsPod(v)) && !w.podRedirects(res, v) {
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
	known, ok := w.forward[v.leaving()]
	switch moved := v.first && v.proto == packet.SCTP && known.Port() != v.port(sideSource); {
	case !ok || v.hidden || v.later || v.error():
	case moved && res.outcome == policy.DropFragment: // see decision 13
		w.clocks.touch(forwardClock, v.leaving(), v)
	default:
		w.failf(egress, frame, res, "it belongs to a mapping")
	}
}

// strayReset tells whether a bare RST of the node was dropped, which no socket of its own sent: it
// would end a pod's connection whose mapping was lost.
func (w *world) strayReset(res result, v wire) bool {
	const flags = packet.SYN | packet.FIN | packet.RST | packet.ACK
	return res.outcome == policy.DropStray && w.isHost(v.src) && v.proto == packet.TCP && v.decidable(0).TCPFlags&flags == packet.RST
}

// podRedirects tells whether a redirect about a mapped flow was dropped: whomever it is for, a pod is nobody's router.
func (w *world) podRedirects(res result, v wire) bool {
	if res.outcome != policy.DropProtocol || !v.redirect() || w.isHost(v.src) {
		return false
	}
	q, ok := v.quote()
	_, known := w.forward[q.arriving()]
	return ok && (known || w.host > 0 && w.isHost(q.dst))
}

// showsPod tells whether v is an ICMPv6 error of the node that quotes a later fragment for a pod which is not known
// to have come untranslated (decision 5).
func (w *world) showsPod(v wire) bool {
	if v.is4 || !v.error() || w.decide(v).Outcome != policy.PassHost {
		return false
	}
	q, ok := v.quote()
	note, noted := w.notes[noteKey(ingress, q)]
	return ok && q.later && w.isPod(q.dst) && (!noted || note.outcome == policy.MasqFragment)
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
	if w.showsPod(v) && res.outcome == policy.PassHost {
		w.failf(egress, frame, res, "the quote may show a pod's address")
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
		answered = answered || w.host > 0 && w.isHost(v.dst) // the node's own flows have entries too
		if q, ok := v.quote(); v.error() && ok && v.dst == q.src {
			_, answered = w.forward[q.leaving()] // or is an error about one, for the inner host
			answered = answered || w.host > 0 && w.isHost(q.src)
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
