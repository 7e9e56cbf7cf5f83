package datapath

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

const (
	heldWindow = 64   // HELD_WINDOW of bpf/config.h
	heldBytes  = 2048 // HELD_BYTES
)

// second watches the fragments that arrive at eth0 once more. Nothing is attached
// there: the test runs the programs on them.
type second struct {
	*rig
	capture *lab.Capture
	seen    int
}

func (r *rig) watchAgain() *second {
	r.t.Helper()
	r.must(r.ns.SetMTU("eth0", 9000)) // or kernel 5.10 lets nothing larger arrive again
	r.must(r.ns.SetUp("eth0"))
	r.t.Cleanup(func() { r.ns.SetDown("eth0") })
	return &second{rig: r, capture: labtest.Capture(r.t, r.ns, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1 << 16})}
}

// arrived returns the n frames that have arrived since the last call; of each size,
// because a later one would be a mistake too.
func (a *second) arrived(n int) (frames [][]byte) {
	a.t.Helper()
	labtest.Eventually(a.t, 5*time.Second, func() error {
		all := a.capture.Packets()
		frames = nil
		for _, p := range all[a.seen:] {
			frames = append(frames, p.Data)
		}
		if len(frames) != n {
			return fmt.Errorf("%d fragments arrived again, want %d", len(frames), n)
		}
		return nil
	})
	a.seen += n
	return frames
}

// late runs fragments, all of them before the first, which then gives outcome
// first; the held ones arrive again and give outcome later. It returns what came
// out, in order.
func (a *second) late(link packet.Link, frames [][]byte, first, later policy.Outcome) [][]byte {
	a.t.Helper()
	for i := len(frames) - 1; i > 0; i-- {
		if res := a.run(ingress, "eth0", link, frames[i]); res.outcome != policy.HoldFragment {
			a.t.Fatalf("fragment %d: %s, want it held", i, res.outcome)
		}
	}
	out := a.pieces(ingress, link, frames[:1], first, later)
	held := a.arrived(len(frames) - 1)
	for i, frame := range frames[1:] {
		at := slices.IndexFunc(held, func(b []byte) bool {
			// With padding only behind a first fragment that was too large to be set aside.
			return bytes.HasPrefix(b, frame) && (len(b) == len(frame) || len(frames[0]) > heldBytes)
		})
		if at < 0 {
			a.t.Fatalf("fragment %d did not arrive again as it was:\n was %x", i+1, frame[:60])
		}
		res := a.run(ingress, "eth0", link, held[at])
		if res.outcome != later {
			a.t.Fatalf("fragment %d: %s, want %s", i+1, res.outcome, later)
		}
		out = append(out, res.data)
	}
	return out
}

// Every kind of packet, its fragments reversed; the first is as large as a frame or
// larger than what is held.
func testHold(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		a := r.watchAgain()
		for _, k := range labtest.Thin(t, "kinds", f.large()) {
			t.Run(f.name+" "+k.name, func(t *testing.T) {
				a.rig = r.on(t)
				a.clear()
				a.pieces(egress, k.p.Link, k.p.Fragments(fragmentSize), policy.MasqNew, policy.MasqFragment)
				e := a.flows(forwardTable)
				in := k.p.From(f.node, e[0].xlate.Port()).Reply()
				a.reassembled(k.p.Reply(), a.late(k.p.Link, in.Fragments(fragmentSize), policy.MasqKnown, policy.MasqFragment))
				// Not the note of the one before.
				in.ID++
				want := k.p.Reply()
				want.ID++
				a.reassembled(want, a.late(k.p.Link, in.Fragments(fragmentSize), policy.MasqKnown, policy.MasqFragment))
			})
		}
	})
}

// What comes for the node itself reaches it, in whatever order: also when nobody
// can tell its ports.
func testHoldForNode(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		a := r.watchAgain()
		p := f.udp().Reply().To(f.gateway, 53)
		p.Payload = make([]byte, 3000)
		got := a.late(p.Link, p.Fragments(fragmentSize), policy.PassNoMapping, policy.PassNoMapping)
		r.reassembled(p, got)
		p.ID++
		r.pieces(ingress, p.Link, p.Fragments(fragmentSize), policy.PassNoMapping, policy.PassNoMapping)
		p.ID++ // its first fragment is larger than what can be held
		p.Payload = make([]byte, 4000)
		frames := p.Fragments(3504)
		if !bytes.Equal(frames[0], a.late(p.Link, frames, policy.PassNoMapping, policy.PassNoMapping)[0]) {
			t.Error("the first fragment was altered")
		}
		tiny := f.tcp(packet.SYN).Reply().To(f.gateway, 443)
		tiny.ID = 77
		a.late(tiny.Link, tiny.Fragments(8), policy.PassNoMapping, policy.PassNoMapping)
		tiny.ID++
		r.pieces(ingress, tiny.Link, tiny.Fragments(8), policy.PassNoMapping, policy.PassNoMapping)
	})
}

// Where no address is translated nothing is held.
func testHoldNothing(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp().Reply()
		p.Payload = make([]byte, 3000)
		for _, dst := range []packet.Packet{p, p.To(f.foreign, 1), p.To(f.remote, 1)} {
			frames := dst.Fragments(fragmentSize)
			r.pieces(ingress, p.Link, frames[1:], policy.PassNoMapping, policy.PassNoMapping)
		}
	})
}

// What is too much is left to the node, and by its own name.
func testHoldBounds(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp().Reply().To(f.node, keptPort)
		p.Payload = make([]byte, 3000)
		frames := p.Fragments(40)
		for i, frame := range frames[1:] {
			want := policy.HoldFragment
			if i >= heldWindow {
				want = policy.PassFragment
			}
			if res := r.run(ingress, "eth0", p.Link, frame); res.outcome != want {
				t.Fatalf("fragment %d: %s, want %s", i+1, res.outcome, want)
			}
		}
		// Their first did not come: others get the places, and they are counted as lost.
		r.ageHeld(3)
		for _, frame := range frames[1 : heldWindow+1] {
			r.execute(ingress, p.Link, frame, skbContext{Ifindex: uint32(r.device["eth0"])}, 1)
			if moved := r.moved(ingress); moved[policy.HoldFragment] != 1 || moved[policy.DropFragment] != 1 {
				t.Fatalf("counted %v, want one held and one lost", moved)
			}
		}
		r.emptyHeld()
		// To the byte.
		head := p.HeaderSize()
		if p.Src.Is6() {
			head += 8
		}
		size := (heldBytes - head) / 8 * 8
		p.Payload = make([]byte, 9000)
		fits, large := p.Fragments(size)[1], p.Fragments(size + 8)[1]
		if res := r.run(ingress, "eth0", p.Link, fits); res.outcome != policy.HoldFragment {
			t.Errorf("%d bytes: %s", len(fits), res.outcome)
		}
		if res := r.run(ingress, "eth0", p.Link, large); res.outcome != policy.PassFragment {
			t.Errorf("%d bytes: %s", len(large), res.outcome)
		}
	})
}

// A fragment is held for two seconds: a first one that comes later is alone.
func testHoldExpires(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		a := r.watchAgain()
		p := f.udp().Reply().To(f.gateway, 53)
		p.Payload, p.ID = make([]byte, 3000), 0x7777
		frames := p.Fragments(fragmentSize)
		r.pieces(ingress, p.Link, frames[1:], policy.HoldFragment, policy.HoldFragment)
		r.ageHeld(3)
		r.pieces(ingress, p.Link, frames[:1], policy.PassNoMapping, policy.PassNoMapping)
		a.arrived(0)
	})
}

// Overlapping fragments follow their first like any others: which bytes count is the
// receiver's affair (RFC 5722 has it drop them all). An ID that is used again speaks
// for the datagram that it was last used for.
func testFragmentsOverlap(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.udp()
		p.Payload = make([]byte, 3000)
		out := p.From(f.node, keptPort)
		r.pieces(egress, p.Link, append(p.Fragments(1400), p.Fragments(704)[1:]...), policy.MasqNew, policy.MasqFragment)
		in := append(out.Reply().Fragments(1400), out.Reply().Fragments(704)[1:]...)
		r.pieces(ingress, p.Link, in, policy.MasqKnown, policy.MasqFragment)

		other := p.From(f.pod2, changedPort)
		r.pieces(egress, p.Link, other.Fragments(1400), policy.MasqNew, policy.MasqFragment)
		var external uint16
		for _, e := range r.flows(forwardTable) {
			if e.key.local.Addr() == f.pod2 {
				external = e.xlate.Port()
			}
		}
		reply := other.From(f.node, external).Reply()
		got := r.pieces(ingress, p.Link, reply.Fragments(1400), policy.MasqKnown, policy.MasqFragment)
		r.reassembled(other.Reply(), got)
		got = r.pieces(ingress, p.Link, out.Reply().Fragments(1400), policy.MasqKnown, policy.MasqFragment)
		r.reassembled(p.Reply(), got)
	})
}

// heldSince is where struct held has the second in which a place was taken.
const heldCalled, heldSince = 4, 8

// eachHeld changes every place for a fragment.
func (r *rig) eachHeld(change func(value []byte)) {
	r.t.Helper()
	m := r.d.objs.Held
	for i := range m.MaxEntries() {
		value, err := m.LookupBytes(i)
		r.must(err)
		if nativeEndian.Uint32(value[heldCalled:])|nativeEndian.Uint32(value[heldSince:]) != 0 {
			change(value)
			r.must(m.Put(i, value))
		}
	}
}

func (r *rig) emptyHeld() {
	r.t.Helper()
	r.eachHeld(func(value []byte) { clear(value) })
}

// ageHeld moves the clock of everything that is held back by some seconds.
func (r *rig) ageHeld(seconds uint32) {
	r.t.Helper()
	r.eachHeld(func(value []byte) {
		for _, at := range []int{heldCalled, heldSince} {
			if v := nativeEndian.Uint32(value[at:]); v != 0 {
				nativeEndian.PutUint32(value[at:], v-seconds)
			}
		}
	})
}
