package datapath

import (
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
)

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

func (w *world) egressOnly(frame []byte) { w.egress(frame) }

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
