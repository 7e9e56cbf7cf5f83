package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// refuse sends a forwarded packet of a pod that may have no mapping any more.
func (q quotaRig) refuse(p packet.Packet, frame []byte, ctx skbContext) result {
	q.t.Helper()
	ctx.Ifindex, ctx.IngressIfindex = uint32(q.device["eth0"]), uint32(q.device["eth1"])
	res := q.runContext(egress, p.Link, frame, ctx, 1)
	if res.outcome != policy.DropQuota {
		q.t.Fatalf("%s of %s", res.outcome, show(p))
	}
	return res
}

// full gives each pod one mapping, which pod 0 has.
func (q quotaRig) full() {
	q.t.Helper()
	in := q.familyInput()
	in.MaxPortsPerPod = 1
	q.apply(in)
	q.open(0, 2000, policy.MasqNew)
}

// answer is the ICMP error that a frame's sender must get, but for its TOS.
func (q quotaRig) answer(frame []byte) []byte {
	e := packet.Packet{Src: q.f.node, Dst: q.f.pod, Proto: q.f.icmp, Type: 3, Code: 13}
	most := 576 - 28
	if q.f.node.Is6() {
		e.Type, e.Code, most = 1, 1, 1280-48
	}
	e.Payload = frame[14:min(len(frame), 14+most)]
	return e.Build()
}

// A refused packet goes back to its pod as an ICMP error of the node that quotes it
// as it was, as far as an error may go; every checksum is that of the bytes.
func testRefusalIsTold(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		q.full()
		for _, size := range []int{0, 1, 2, 3, 7, 400, 484, 485, 488, 491, 492, 493, 511, 512, 513, 1000, 1180, 1181, 1400} {
			for name, p := range map[string]packet.Packet{"UDP": q.f.udp(), "TCP": q.f.tcp(packet.SYN)} {
				q.must(q.d.objs.Pods.Put(addrTo(p.Src), masqPod{Flows: 1}))
				p.SrcPort, p.Payload = 2001, make([]byte, size)
				for i := range p.Payload {
					p.Payload[i] = byte(i*7 + size)
				}
				frame := p.Build()
				res, want := q.refuse(p, frame, skbContext{}), q.answer(frame)
				if !res.told || len(res.data) != len(want) {
					t.Fatalf("%s and %d bytes: told %v, %d bytes, want %d", name, size, res.told, len(res.data), len(want))
				}
				if err := packet.CheckOuter(packet.Ethernet, res.data); err != nil {
					t.Errorf("%s and %d bytes: %v", name, size, err)
				}
				if p.Src.Is4() { // the TOS, and with it the header's checksum
					if res.data[15] != 0xc0 {
						t.Errorf("TOS %#x", res.data[15])
					}
					copy(want[15:16], res.data[15:])
					copy(want[24:26], res.data[24:])
				}
				if !bytes.Equal(want, res.data) {
					t.Errorf("%s and %d bytes:\n want %x\n got  %x", name, size, want, res.data)
				}
			}
		}
	})
}

// Ten at once and ten a second, and nothing that does not fit into one error.
func testRefusalIsNotTold(t *testing.T, r *rig) {
	labtest.Kernel(t, forwardedRun)
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		q.full()
		p := q.f.udp()
		p.SrcPort = 2001
		start, told := time.Now(), 0
		for range 100 {
			if q.refuse(p, p.Build(), skbContext{}).told {
				told++
			}
		}
		if most := 11 + int(time.Since(start)/(100*time.Millisecond)); told < 10 || told > most {
			t.Errorf("%d of 100 were told, want 10 to %d", told, most)
		}
		again := func(name string, p packet.Packet, frame []byte, ctx skbContext, want bool) {
			t.Helper()
			q.must(q.d.objs.Pods.Put(addrTo(p.Src), masqPod{Flows: 1}))
			if res := q.refuse(p, frame, ctx); res.told != want {
				t.Errorf("%s: told %v", name, res.told)
			}
		}
		again("again", p, p.Build(), skbContext{}, true)
		big := p
		big.Payload = make([]byte, 3000)
		again("super-packet", big, big.Build(), skbContext{GSOSegs: 3, GSOSize: 1000}, false)
		tagged := p
		tagged.Link = packet.VLAN
		again("VLAN", tagged, tagged.Build(), skbContext{}, false)
		padded := append(p.Build(), make([]byte, 9)...)
		q.must(q.d.objs.Pods.Put(addrTo(p.Src), masqPod{Flows: 1}))
		if res := q.refuse(p, padded, skbContext{}); !res.told || len(res.data) != len(q.answer(p.Build())) {
			t.Errorf("padding: told %v, %d bytes", res.told, len(res.data))
		}
		cut := p
		cut.Payload = make([]byte, 100)
		again("cut", cut, cut.Build()[:100], skbContext{}, false)
		if p.Src.Is4() {
			first := p.Build()
			binary.BigEndian.PutUint16(first[20:], 0x2000)
			binary.BigEndian.PutUint16(first[24:], binary.BigEndian.Uint16(first[24:])-0x2000)
			again("first fragment", p, first, skbContext{}, false)
		}
		own := q.run(egress, "eth0", p.Link, p.Build())
		if fmt.Sprint(own.outcome) != "drop-quota" || own.told {
			t.Errorf("not forwarded: %s, told %v", own.outcome, own.told)
		}
	})
}
