package datapath

import (
	"slices"

	"bauta.dev/bauta/internal/lab/packet"
)

// Seeds: the choices that let the fuzz tests reach, without a search, what a fault in the programs
// would be seen by. Each was written for a fault that nothing else of the seeds showed.

// pick is what a seed chooses of a packet: see world.packet. Zeros are a pod, the remote, the kind's
// own ports, flags and payload.
type pick struct {
	fam, kind int
	src, dst  byte
	ports     []byte // source, destination, identifier, by choices.port
	flags     []byte
	payload   byte
	id        byte
}

// Choices of ports.
const (
	pickKept = iota
	pickChanged
	pickFirst
	pick53
	pick443
)

func (p pick) bytes() []byte {
	b := []byte{byte(p.kind<<1 | p.fam), p.src, p.dst, byte(len(p.ports) / 3)}
	for _, port := range p.ports {
		b = append(b, 0, 0, port) // the first two are what a number of the fuzzer's own would be
	}
	if kindsOfAll[p.fam][p.kind].p.Proto == packet.TCP {
		b = append(append(b, byte(len(p.flags))), p.flags...)
	}
	b = append(b, p.payload)
	if p.payload > 0 && p.payload < 4 {
		b = append(b, 0, 40) // of 40 bytes
	}
	return append(b, p.id)
}

// Steps of a sequence. What leaves translated is answered.
func stepLeaves(p pick) []byte  { return slices.Concat([]byte{0}, p.bytes(), []byte{0, 1}) }
func stepPasses(p pick) []byte  { return slices.Concat([]byte{0}, p.bytes(), []byte{0}) }
func stepArrives(p pick) []byte { return slices.Concat([]byte{2}, p.bytes(), []byte{0}) }
func stepAnswers(p pick) []byte { return slices.Concat([]byte{3}, p.bytes(), []byte{0}) }
func stepAges() []byte          { return []byte{12} }
func stepPieces(order ...byte) []byte {
	b := []byte{11} // 96 bytes each
	for _, n := range order {
		b = append(b, n, 0)
	}
	return b
}

// sequences are seeds of FuzzSequence.
func sequences() (all [][]byte) {
	add := func(steps ...[]byte) { all = append(all, slices.Concat(steps...)) }
	for fam := range families {
		const syn, ack, udp = 0, 1, 2 // in kindsOfAll
		one := func(kind int) pick { return pick{fam: fam, kind: kind} }
		// A connection, time, another connection on its mapping, time without packets.
		add(stepLeaves(one(syn)), stepLeaves(one(ack)), stepAges(), stepLeaves(one(ack)), stepAges(), stepLeaves(one(syn)))
		rst := one(ack)
		rst.flags = []byte{packet.RST}
		add(stepLeaves(one(syn)), stepAges(), stepLeaves(rst), stepAges(), stepLeaves(rst))
		add(stepLeaves(one(udp)), stepAges(), stepLeaves(one(udp)), stepAges())
		// Errors keep no mapping: one about what left, two about its answer.
		add(stepLeaves(one(udp)), stepAges(), []byte{6, 0, 0, 0, 0, 0})
		add(stepLeaves(one(udp)), stepAges(), []byte{7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
		// The same ports of two protocols.
		same := []byte{pickKept, pick53, pickKept}
		add(stepLeaves(pick{fam: fam, kind: udp, ports: same}), stepLeaves(pick{fam: fam, kind: syn, ports: same}))
		// Opened from outside, then by the pod with the same ports; answered, and kept by answers.
		outside := pick{fam: fam, kind: syn, ports: []byte{pick443, pickKept, pickKept}}
		add(stepArrives(outside), stepLeaves(one(syn)))
		data := outside
		data.kind = ack
		add(stepArrives(outside), stepPasses(one(ack)), stepArrives(data), stepAges(), stepPasses(one(ack)))
		add(stepAnswers(one(udp)), stepAges(), stepPasses(one(udp)))
		// An error about it, for somebody else; the first three are for the one who sent it.
		for _, to := range []byte{0, 4} {
			add(stepAnswers(one(udp)), []byte{7, 0, 0, 0, 0, 0, 0, 0, 0, to, 0, 0})
		}
		// A first fragment that has the ports, and not all of the header.
		add(slices.Concat([]byte{8}, one(syn).bytes(), []byte{0, 1, 0, 0, 0, 0, 0, 0, 0, 0}))
		for _, kind := range []int{syn, udp, 6, 7, 8} {
			for _, port := range []byte{pickKept, pickChanged} {
				p := pick{fam: fam, kind: kind, ports: []byte{port, pick53, port}, payload: 2}
				// Fragments of one datagram, of another ID, and of another protocol with the same ID.
				other, third := p, p
				other.id, third.kind = 1, map[bool]int{true: 8, false: udp}[kind == udp]
				leave := func(p pick, order ...byte) []byte {
					return slices.Concat([]byte{8}, p.bytes(), []byte{0}, stepPieces(order...))
				}
				add(leave(p, 0, 1, 1, 0), leave(other, 1, 1, 0, 1), leave(third, 1, 1, 0, 1))
				// The first one arrives, which says nothing about those that leave.
				add(slices.Concat([]byte{9}, p.bytes(), []byte{0}, stepPieces(0, 0, 0, 0)), leave(p, 1, 1, 1, 1))
				// The answer in fragments, and that of another ID.
				arrive := slices.Concat([]byte{10}, p.bytes(), stepPieces(0, 1, 1, 0))
				again := slices.Concat([]byte{10}, other.bytes(), stepPieces(1, 1, 0, 1))
				add(arrive, again)
				// Errors in fragments, both ways.
				e := slices.Concat([]byte{11}, p.bytes(), []byte{0},
					[]byte{0, 0, 0, 0}, stepPieces(0, 1, 1, 0), []byte{0, 0, 0, 0, 0}, stepPieces(0, 1, 1, 0))
				add(e)
			}
		}
	}
	return all
}

// errorSeeds are seeds of FuzzICMPError.
func errorSeeds() (all [][]byte) {
	for fam := range families {
		redirect := byte(len(families[fam].icmpErrors())) // of IPv4; an error of another type in IPv6
		for i, k := range kindsOfAll[fam] {
			p := pick{fam: fam, kind: i, ports: []byte{pickChanged, pick53, pickChanged}}
			// spoiled is what follows an error's choices.
			add := func(p pick, cut, typ byte, spoiled ...byte) {
				all = append(all, slices.Concat(p.bytes(), []byte{cut, 0, typ}, spoiled, []byte{cut, 0, 0, typ}, spoiled))
			}
			for _, cut := range []byte{0, 8, 28, 40} {
				add(p, cut, 0, 0)
			}
			if k.p.Proto == packet.UDP || k.p.Proto == packet.UDPLite {
				for zero := byte(4); zero < 7; zero++ {
					p.payload = zero
					add(p, 0, 0, 0)
					kept := p
					kept.ports = nil
					add(kept, 0, 0, 0)
				}
				p.payload = 0
			}
			add(p, 0, redirect, 0)
			add(p, byte(8+20*fam), 0, 4, 40) // padding where the checksum would be
			add(p, 0, 0, 2, 0, 50, 33)       // another time to live in the quote of an Ethernet frame
		}
	}
	return all
}

// zeroChecksums are packets of ports whose transport checksum, or that of the translated packet, is zero.
func (f family) zeroChecksums() (all []packet.Packet) {
	lite := f.udp()
	lite.Proto = packet.UDPLite
	for _, p := range []packet.Packet{f.udp(), f.udp().From(f.pod, changedPort), lite, lite.From(f.pod, changedPort), f.tcp(packet.SYN)} {
		for _, as := range []packet.Packet{p, p.From(f.node, p.SrcPort), p.From(f.node, firstPort)} {
			p.Payload = zeroChecksum(p, as)
			all = append(all, p)
		}
	}
	return all
}
