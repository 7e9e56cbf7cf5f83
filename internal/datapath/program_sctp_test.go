package datapath

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

func (f family) sctp(chunk uint8) packet.Packet {
	return packet.Packet{Src: f.pod, Dst: f.remote, Proto: packet.SCTP, SrcPort: keptPort, DstPort: 36412, Type: chunk, Seq: 7,
		Payload: []byte("some payload")}
}

// cut runs the first bytes of a packet through a program. The programs know the
// rest by the IP header only: that is how packets come here that are larger than
// what a test run takes. It returns the packet with the rest as it was.
func (r *rig) cut(dir direction, p packet.Packet, keep int, want policy.Outcome) []byte {
	r.t.Helper()
	frame := p.Build()
	keep = min(keep, len(frame))
	res := r.run(dir, "eth0", p.Link, frame[:keep])
	if res.outcome != want {
		r.t.Fatalf("%s of %s, %d bytes: %s, want %s", dir, show(p), len(frame), res.outcome, want)
	}
	return append(slices.Clone(res.data), frame[keep:]...)
}

// The CRC of a packet with another port is the one that hash/crc32 gives for the
// whole of it, for every length. Cilium refuses to change the port of SCTP, loxilb
// reads the payload for it.
func testSCTPLengths(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	rng := labtest.Rand(t)
	sizes := []int{0, 1, 2, 3, 4, 5, 8, 100, 1404, 1484, 8964, 16383, 32768, 65535 - 60 - 16}
	for range 60 {
		sizes = append(sizes, rng.IntN(65000))
	}
	eachFamily(t, r, func(r *rig, f family) {
		p := f.sctp(packet.SCTPData)
		p.SrcPort = changedPort
		for _, size := range sizes {
			p.Payload = randomBytes(rng, size)
			p.DstPort, p.Seq = uint16(rng.Uint32()), rng.Uint32()
			got := r.cut(egress, p, 256, policy.MasqNew)
			out := p.From(f.node, sourcePort(p, got))
			if out.SrcPort == changedPort {
				t.Fatalf("the port was kept")
			}
			r.same(out, got)
			r.same(out, r.cut(egress, p, 256, policy.MasqKnown))
			r.same(p.Reply(), r.cut(ingress, out.Reply(), 256, policy.MasqKnown))
			r.clear()
		}
	})
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

// The table of powers of x is what hash/crc32 makes of as many zeros. That function
// starts from ^crc and returns ^crc: two of its results differ by the linear part.
func TestSCTPPowers(t *testing.T) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	const one = 1 << 31
	row := []uint32{one} // x^(8n) for n from 0 on, as far as a row goes
	table := crc32.MakeTable(crc32.Castagnoli)
	want := make([]byte, 0, 4*16*4)
	zeros := make([]byte, 1<<16)
	for digit := range 4 {
		for n := range 16 {
			run := zeros[:n<<(4*digit)]
			power := crc32.Update(^row[0], table, run) ^ crc32.Update(^uint32(0), table, run)
			want = binary.LittleEndian.AppendUint32(want, power)
		}
	}
	for name, m := range spec.Maps {
		if len(m.Contents) == 1 {
			if b, ok := m.Contents[0].Value.([]byte); ok && slices.Contains(windows(b, len(want)), string(want)) {
				t.Logf("found in %s", name)
				return
			}
		}
	}
	t.Errorf("no section of constants has % x ...", want[:16])
}

// windows returns the words-aligned pieces of b with n bytes.
func windows(b []byte, n int) []string {
	var out []string
	for i := 0; i+n <= len(b); i += 4 {
		out = append(out, string(b[i:i+n]))
	}
	return out
}

// A packet whose CRC the device will fill, also of a GSO packet, has 0 there: it
// stays 0 (nat.md 4.8).
func testSCTPOffloaded(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, port := range []uint16{keptPort, changedPort} {
			r.clear()
			p := f.sctp(packet.SCTPData).From(f.pod, port)
			send := func(dir direction, p packet.Packet, segments uint32) []byte {
				frame := p.Build()
				clear(frame[14+p.HeaderSize()+8:][:4])
				ctx := skbContext{Ifindex: uint32(r.device["eth0"]), GSOSegs: segments}
				return r.runContext(dir, p.Link, frame, ctx, 1).data
			}
			for _, segments := range []uint32{0, 3} {
				got := send(egress, p, segments)
				want := p.From(f.node, sourcePort(p, got)).Build()
				clear(want[14+p.HeaderSize()+8:][:4])
				if !slices.Equal(got, want) {
					t.Errorf("port %d, %d segments:\n want %x\n got  %x", port, segments, want, got)
				}
			}
		}
	})
}

// Two pods with one port to one remote: the second gets another port, the
// associations go on side by side. An INIT opens one whatever was before.
func testSCTPPorts(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.sctp(packet.SCTPInit)
		out := r.translate(p, policy.MasqNew, f.node)
		if out.SrcPort != keptPort {
			t.Errorf("port %d", out.SrcPort)
		}
		p2 := p.From(f.pod2, keptPort)
		out2 := r.translate(p2, policy.MasqNew, f.node)
		if out2.SrcPort == keptPort {
			t.Errorf("two pods have one port")
		}
		for _, chunk := range []uint8{packet.SCTPInitAck, packet.SCTPSack, packet.SCTPAbort} {
			p.Type, p2.Type, out.Type, out2.Type = chunk, chunk, chunk, chunk
			r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
			r.send(ingress, out2.Reply(), policy.MasqKnown, p2.Reply())
			r.send(egress, p2, policy.MasqKnown, out2)
		}
	})
}

// The chunk decides as the flags of TCP do: decision 13.
func testSCTPChunks(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for chunk := range uint8(20) {
			r.clear()
			p := f.sctp(chunk)
			switch chunk {
			case packet.SCTPInitAck, packet.SCTPAbort, packet.SCTPShutdown, packet.SCTPShutdownAck, packet.SCTPShutdownComplete:
				r.expect(egress, p, policy.DropStray)
				r.expect(egress, p.To(f.excluded, p.DstPort), policy.PassNative)
				r.expect(egress, p.From(f.node, p.SrcPort), policy.PassHost)
			default:
				r.translate(p, policy.MasqNew, f.node)
				r.clear()
			}
			// A pod that was called answers untranslated, and calls back by a mapping.
			r.expect(ingress, f.sctp(packet.SCTPInit).Reply(), policy.PassInbound)
			if chunk == packet.SCTPInit {
				r.translate(p, policy.MasqNew, f.node)
			} else {
				r.expect(egress, p, policy.PassInbound)
			}
		}
	})
}

// A fragment does not tell the length of the packet: it keeps its port or is dropped.
func testSCTPFragments(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.sctp(packet.SCTPData)
		p.Payload = make([]byte, 3000)
		frags := func(p packet.Packet) [][]byte { return p.Fragments(fragmentSize) }
		out := p.From(f.node, keptPort)

		// Its own port, in the pool and free.
		r.reassembled(out, r.pieces(egress, p.Link, frags(p), policy.MasqNew, policy.MasqFragment))
		r.reassembled(p.Reply(), r.pieces(ingress, p.Link, frags(out.Reply()), policy.MasqKnown, policy.MasqFragment))
		// In the pool but not free; not in the pool.
		r.pieces(egress, p.Link, frags(p.From(f.pod2, keptPort)), policy.DropFragment, policy.DropFragment)
		r.pieces(egress, p.Link, frags(p.From(f.pod2, changedPort)), policy.DropFragment, policy.DropFragment)
		if n := len(r.flows(forwardTable)); n != 1 {
			t.Errorf("%d flows", n)
		}
		// On a mapping with another port, in both directions.
		short := f.sctp(packet.SCTPInit).From(f.pod2, changedPort)
		moved := r.translate(short, policy.MasqNew, f.node)
		p.ID++
		r.pieces(egress, p.Link, frags(p.From(f.pod2, changedPort)), policy.DropFragment, policy.DropFragment)
		r.pieces(ingress, p.Link, frags(p.From(f.node, moved.SrcPort).Reply())[:1], policy.DropFragment, policy.DropFragment)
	})
}

// SCTP too short for a chunk, and a header too short for a checksum.
func testSCTPShort(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		p := f.bare(packet.SCTP)
		for _, size := range []int{8, 12, 15} {
			frame := f.sctp(packet.SCTPData).Build()[:14+p.HeaderSize()+size]
			if res := r.run(egress, "eth0", p.Link, frame); res.outcome != policy.DropBadHeader {
				t.Errorf("%d bytes: %s", size, res.outcome)
			}
		}
	})
}

// The node's SCTP and UDP-Lite have sockets that no program can look up: like its
// pings they claim their ports, whoever comes first.
func testHostClaimsPorts(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		lite := f.udp()
		lite.Proto = packet.UDPLite
		for _, p := range []packet.Packet{f.sctp(packet.SCTPInit), lite} {
			t.Run(fmt.Sprintf("protocol %d", p.Proto), func(t *testing.T) {
				r := r.on(t)
				r.clear()
				host := p.From(f.node, keptPort)
				r.expect(egress, host, policy.PassHost)
				r.expect(egress, host, policy.PassHost)
				out := r.translate(p, policy.MasqNew, f.node)
				if out.SrcPort == keptPort {
					t.Errorf("the pod has the node's port")
				}
				r.expect(ingress, host.Reply(), policy.PassHost)
				r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
				// Outside the pool there is nothing to meet.
				r.expect(egress, host.From(f.node, changedPort), policy.PassHost)
				if n := len(r.flows(forwardTable)); n != 2 {
					t.Errorf("%d mappings", n)
				}
				// The other way round the node gets another port.
				r.clear()
				r.translate(p, policy.MasqNew, f.node)
				moved := r.translate(host, policy.MasqHost, f.node)
				r.send(ingress, moved.Reply(), policy.MasqHost, host.Reply())
			})
		}
	})
}
