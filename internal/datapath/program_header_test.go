package datapath

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Ethernet types of VLAN tags: 802.1Q and 802.1ad.
const (
	tagQ  = 0x8100
	tagAD = 0x88a8
)

// tagged returns an Ethernet frame with tags, the outer one first.
func tagged(frame []byte, tags ...uint16) []byte {
	for n, tag := range slices.Backward(tags) {
		frame = pushTag(frame, tag, uint16(n+7))
	}
	return frame
}

func pushTag(frame []byte, tag, id uint16) []byte {
	out := slices.Clone(frame[:12])
	out = binary.BigEndian.AppendUint16(out, tag)
	out = binary.BigEndian.AppendUint16(out, id)
	return append(out, frame[12:]...)
}

// turn is a packet of a conversation, and what it must become.
type turn struct {
	dir     direction
	frame   []byte
	outcome policy.Outcome
	want    []byte
}

// conversation is what has to be translated alike behind any tags: packets both
// ways, errors both ways, fragments both ways.
func (f family) conversation(p, out packet.Packet) []turn {
	steps := []turn{
		{egress, p.Build(), policy.MasqNew, out.Build()},
		{ingress, out.Reply().Build(), policy.MasqKnown, p.Reply().Build()},
		{egress, p.Build(), policy.MasqKnown, out.Build()},
		{egress, p.To(f.excluded, 80).Build(), policy.PassNative, p.To(f.excluded, 80).Build()},
		{egress, p.From(f.foreign, 80).Build(), policy.PassSource, p.From(f.foreign, 80).Build()},
	}
	for _, v := range f.views(p, out) {
		steps = append(steps, turn{v.dir, f.unreachable(v.about, v.src).Build(), policy.MasqError, f.unreachable(v.wantFor, v.wantSrc).Build()})
	}
	if isAtomic(p) || p.Proto == packet.SCTP && p.SrcPort != out.SrcPort {
		return steps // has its fragment header, or can't be fragmented
	}
	p.Payload, out.Payload = make([]byte, 400), make([]byte, 400)
	for _, d := range []struct {
		dir      direction
		in, want packet.Packet
	}{{egress, p, out}, {ingress, out.Reply(), p.Reply()}} {
		want := d.want.Fragments(160)
		for i, frame := range d.in.Fragments(160) {
			steps = append(steps, turn{d.dir, frame, [...]policy.Outcome{policy.MasqKnown, policy.MasqFragment}[min(i, 1)], want[i]})
		}
	}
	return steps
}

// Up to two tags of either kind in the data, for all kinds of packets; behind a third
// one may stand anything, so it is not for pods to send. einat passes what has tags
// with the source of the pod.
func testTags(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, tags := range labtest.Thin(t, "combinations of tags", [][]uint16{{tagQ}, {tagAD}, {tagQ, tagQ}, {tagAD, tagQ}, {tagQ, tagAD}, {tagAD, tagAD}}) {
			for _, k := range f.opening() {
				r.clear()
				out := k.p.From(f.node, keptPort)
				for i, s := range f.conversation(k.p, out) {
					res := r.run(s.dir, "eth0", packet.Ethernet, tagged(s.frame, tags...))
					if want := tagged(s.want, tags...); res.outcome != s.outcome || !slices.Equal(res.data, want) {
						t.Fatalf("%x, %s, step %d: %s, want %s\n want %x\n got  %x", tags, k.name, i, res.outcome, s.outcome, want, res.data)
					}
				}
			}
		}
		frame := tagged(f.udp().Build(), tagAD, tagQ, tagQ)
		if res := r.run(egress, "eth0", packet.Ethernet, frame); res.outcome != policy.DropBadHeader {
			t.Errorf("three tags: %s", res.outcome)
		}
		if res := r.run(ingress, "eth0", packet.Ethernet, frame); res.outcome != policy.PassNoMapping {
			t.Errorf("three tags, arriving: %s", res.outcome)
		}
	})
}

// behindTags returns a program that pushes VLAN tags, outermost last, and calls the
// program of a direction. The kernel keeps the last tag in the packet's metadata and
// has the others in the data: what a device with VLAN offload gives.
func (r *rig) behindTags(dir direction, tags ...uint16) *ebpf.Program {
	r.t.Helper()
	target, err := r.d.program(dir, true)
	r.must(err)
	table, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: target}}})
	r.must(err)
	r.t.Cleanup(func() { table.Close() })
	const vlanPresent = 20 // in struct __sk_buff
	ins := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for n, tag := range tags {
		ins = append(ins,
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, int32(swapPort(tag))), asm.Mov.Imm(asm.R3, int32(n+7)),
			asm.FnSkbVlanPush.Call(), asm.JNE.Imm(asm.R0, 0, "failed"))
	}
	ins = append(ins,
		asm.LoadMem(asm.R0, asm.R6, vlanPresent, asm.Word), asm.JEq.Imm(asm.R0, 0, "failed"),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, table.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, 99).WithSymbol("failed"), asm.Return())
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: ins})
	r.must(err)
	r.t.Cleanup(func() { prog.Close() })
	return prog
}

// A tag that the kernel keeps in the packet's metadata, with up to two more in the data.
func testAcceleratedTags(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		for _, tags := range [][]uint16{{tagQ}, {tagAD}, {tagQ, tagAD}, {tagQ, tagQ, tagAD}} {
			progs := []*ebpf.Program{r.behindTags(egress, tags...), r.behindTags(ingress, tags...)}
			for _, k := range f.opening() {
				r.clear()
				for i, s := range f.conversation(k.p, k.p.From(f.node, keptPort)) {
					opt := ebpf.RunOptions{Data: s.frame, DataOut: make([]byte, len(s.frame)+64),
						Context: skbContext{Ifindex: uint32(r.device["eth0"])}}
					verdict, err := r.runIn(progs[s.dir], &opt)
					r.must(err)
					// The tag that was pushed last is not in the data.
					want := s.want
					for n, tag := range tags[:len(tags)-1] {
						want = pushTag(want, tag, uint16(n+7))
					}
					if verdict != verdictNext || !slices.Equal(opt.DataOut, want) {
						t.Fatalf("%x, %s, step %d: verdict %d\n want %x\n got  %x", tags, k.name, i, int32(verdict), want, opt.DataOut)
					}
					if moved := r.moved(s.dir); len(moved) != 1 || moved[s.outcome] != 1 {
						t.Fatalf("%x, %s, step %d: %v, want %s", tags, k.name, i, moved, s.outcome)
					}
				}
			}
		}
	})
}

// testRunComplete is BPF_F_TEST_SKB_CHECKSUM_COMPLETE (6.11): skb->csum is the
// sum of the packet, as of a network card that computes it, and the run fails with
// EBADMSG if it no longer is afterwards.
const testRunComplete = 1 << 2

// As TestChecksumComplete, for every kind of packet, its errors and its fragments: the
// sum follows every change, above all in IPv6 and where the packet has no checksum
// that makes up for it.
func testCompleteKinds(t *testing.T, r *rig) {
	labtest.Kernel(t, labtest.CompleteRun)
	r.apply(r.familyInput())
	complete := func(c turn) ([]byte, error) {
		prog, err := r.d.program(c.dir, true)
		r.must(err)
		opt := ebpf.RunOptions{Data: c.frame, DataOut: make([]byte, len(c.frame)+64), Flags: testRunComplete,
			Context: skbContext{Ifindex: uint32(r.device["eth0"])}}
		_, err = r.runIn(prog, &opt)
		return opt.DataOut, err
	}
	eachFamily(t, r, func(r *rig, f family) {
		for _, k := range labtest.Thin(t, "kinds", f.kinds()) {
			for _, port := range []uint16{keptPort, changedPort} {
				r.clear()
				p := k.p.From(f.pod, port)
				out := r.translate(p, policy.MasqNew, f.node)
				for _, c := range f.conversation(p, out)[1:] {
					got, err := complete(c)
					if err != nil || !slices.Equal(got, c.want) {
						t.Fatalf("%s from port %d, %s: %s: %v\n want %x\n got  %x", k.name, port, c.dir, c.outcome, err, c.want, got)
					}
					r.moved(c.dir)
				}
			}
		}
	})
}

// A chain of extension headers that is too long or broken hides the transport
// header: that matters to what would be masqueraded, and to nothing else.
func testExtensions(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	f := families[1]
	seven := f.udp()
	seven.Extensions = slices.Repeat([]packet.Extension{{Proto: packet.Destination}}, 7)
	// Each header is complete, but the last one says that it goes on behind the packet.
	broken := f.udp()
	broken.Extensions = []packet.Extension{{Proto: packet.HopByHop}, {Proto: packet.Destination}}
	for _, c := range []struct {
		name  string
		frame func(packet.Packet) []byte
		drop  policy.Outcome
	}{
		{"seven headers", packet.Packet.Build, policy.DropExtension},
		{"header longer than the packet", func(p packet.Packet) []byte {
			p.Extensions = broken.Extensions
			b := p.Build()
			b[14+40+8+1] = 255
			return b
		}, policy.DropBadHeader},
		{"header cut off", func(p packet.Packet) []byte {
			p.Extensions = broken.Extensions
			return p.Build()[:14+40+8+4]
		}, policy.DropExtension},
	} {
		for _, s := range []struct {
			dir  direction
			p    packet.Packet
			want policy.Outcome
		}{
			{egress, seven, c.drop},
			{egress, seven.To(f.excluded, 53), policy.PassNative},
			{egress, seven.From(f.foreign, 53), policy.PassSource},
			{egress, seven.From(f.node, 53), policy.PassHost},
			{egress, seven.To(netip.MustParseAddr("ff02::1"), 53), policy.PassMulticast},
			{ingress, seven.Reply().To(f.node, keptPort), policy.PassNoMapping},
			{ingress, seven.Reply(), policy.PassNoMapping},
		} {
			if res := r.run(s.dir, "eth0", packet.Ethernet, c.frame(s.p)); res.outcome != s.want {
				t.Errorf("%s: %s of %s: %s, want %s", c.name, s.dir, show(s.p), res.outcome, s.want)
			}
		}
	}
}

// Protocols without ports: one inner host a remote, whatever the protocol; and both
// families alike. Cilium passes them with the pod's address.
func testUnknownProtocols(t *testing.T, r *rig) {
	for _, mode := range []policy.UnknownProtocols{policy.UnknownMasquerade, policy.UnknownDrop, policy.UnknownPass} {
		in := r.familyInput()
		in.UnknownProtocols = mode
		r.apply(in)
		eachFamily(t, r, func(r *rig, f family) {
			// GRE, ESP, IP in IP, OSPF and some more, and ICMP of the other family.
			for _, proto := range []uint8{packet.GRE, packet.ESP, 4, 41, 2, 33, 59, 89, 115, 253, 255, packet.ICMP + packet.ICMPv6 - f.icmp} {
				p := f.bare(proto)
				p2 := p.From(f.pod2, 0)
				switch mode {
				case policy.UnknownMasquerade:
					out := r.translate(p, policy.MasqNew, f.node)
					r.send(ingress, out.Reply(), policy.MasqKnown, p.Reply())
					r.send(egress, p, policy.MasqKnown, out)
					r.expect(egress, p2, policy.DropProtocol)
					r.clear()
				case policy.UnknownDrop:
					r.expect(egress, p, policy.DropProtocol)
				case policy.UnknownPass:
					r.expect(egress, p, policy.PassProtocol)
				}
				r.expect(egress, p.To(f.excluded, 0), policy.PassNative)
				r.expect(egress, p.From(f.node, 0), policy.PassHost)
				r.clear()
			}
		})
	}
}

// The node's own ICMP is never dropped, whatever its type: queries and answers,
// errors about its flows, about pods' and about nothing, ND and MLD.
func testHostICMP(t *testing.T, r *rig) {
	r.apply(r.familyInput())
	eachFamily(t, r, func(r *rig, f family) {
		sources := []netip.Addr{f.node, f.gateway}
		destinations := []netip.Addr{f.remote, f.excluded, f.pod}
		if f.name == "IPv6" {
			sources = append(sources, netip.MustParseAddr("fe80::1"), netip.IPv6Unspecified())
			destinations = append(destinations, netip.MustParseAddr("fe80::2"), netip.MustParseAddr("ff02::1"), netip.MustParseAddr("ff02::16"))
		}
		known := r.translate(f.udp(), policy.MasqNew, f.node)
		passes := func(p packet.Packet) {
			frame := p.Build()
			verdict, got := r.execute(egress, p.Link, frame, skbContext{Ifindex: uint32(r.device["eth0"])}, 1)
			if verdict != verdictNext || !slices.Equal(frame, got) {
				t.Errorf("%s: verdict %d", show(p), int32(verdict))
			}
		}
		for typ := range 256 {
			p := packet.Packet{Proto: f.icmp, Type: uint8(typ), Ident: 4711, Payload: []byte("not a quote")}
			for _, p.Src = range sources {
				for _, p.Dst = range destinations {
					passes(p)
				}
			}
			if p.Src = f.node; !isICMPError(p) {
				continue
			}
			for _, about := range []packet.Packet{f.udp().From(f.remote, 53).To(f.node, 22), f.tcp(packet.SYN).Reply(), known.Reply()} {
				for _, cut := range []int{0, 4, 8, -1} {
					passes(about.Error(f.node, p.Type, 0, cut))
				}
			}
		}
		for outcome, n := range r.moved(egress) {
			if outcome.Verdict() != policy.Pass {
				t.Errorf("%d packets: %s", n, outcome)
			}
		}
		r.clear()
	})
}
