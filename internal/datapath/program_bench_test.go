package datapath

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// again returns a program that puts the headers of frame back into the packet, and
// then calls next: a repeated test run goes on with what the program made of the
// packet. At the random offsets from the IP header each packet gets another 16 bits.
func again(b *testing.B, next *ebpf.Program, frame []byte, random ...int) *ebpf.Program {
	b.Helper()
	table, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1,
		Contents: []ebpf.MapKV{{Key: uint32(0), Value: next}}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { table.Close() })
	body := append(frame[14:min(len(frame), 14+80)], make([]byte, 7)...)
	body = body[:(len(frame[14:min(len(frame), 94)]))/8*8]
	base := int16(-int(len(body)))
	ins := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	for at := 0; at < len(body); at += 8 {
		ins = append(ins,
			asm.LoadImm(asm.R0, int64(binary.NativeEndian.Uint64(body[at:])), asm.DWord),
			asm.StoreMem(asm.RFP, base+int16(at), asm.R0, asm.DWord))
	}
	for _, at := range random {
		ins = append(ins, asm.FnGetPrandomU32.Call(), asm.StoreMem(asm.RFP, base+int16(at), asm.R0, asm.Half))
	}
	ins = append(ins,
		asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, 14),
		asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, int32(base)),
		asm.Mov.Imm(asm.R4, int32(len(body))), asm.Mov.Imm(asm.R5, 0), asm.FnSkbStoreBytes.Call(),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, table.FD()), asm.Mov.Imm(asm.R3, 0), asm.FnTailCall.Call(),
		asm.Mov.Imm(asm.R0, -2), asm.Return())
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: ins})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { prog.Close() })
	return prog
}

// nothing is a program that only returns: what the harness itself costs.
func nothing(b *testing.B) *ebpf.Program {
	b.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { prog.Close() })
	return prog
}

// perPacket is the time of one run of prog, the shortest of a few.
func perPacket(b *testing.B, prog *ebpf.Program, frame []byte, repeat int) time.Duration {
	b.Helper()
	best := time.Duration(1 << 62)
	for range 5 {
		_, d, err := prog.Benchmark(frame, repeat, nil)
		if err != nil {
			b.Fatal(err)
		}
		best = min(best, d)
	}
	return best
}

// BenchmarkProgram gives nanoseconds a packet, without those of the harness. A test
// run without a context is on the loopback device: that is the masquerade device.
func BenchmarkProgram(b *testing.B) {
	r := newRigFlows(b, 1<<18)
	in := r.familyInput()
	in.Ports = nil
	for port := 1024; port < 65536; port++ {
		in.Ports = append(in.Ports, uint16(port))
	}
	in.Devices = []policy.Device{{Name: "lo", Index: loopback, IPv4: families[0].node, IPv6: families[1].node}}
	// Random sources in the last two bytes.
	in.Sources = append(in.Sources, policy.Rule{Prefix: netip.MustParsePrefix("8.0.0.0/16"), Origin: "test"})
	for n := range 16384 {
		in.NonMasq = append(in.NonMasq,
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{9, byte(n >> 8), byte(n), 0}), 24), Origin: "test"},
			policy.Rule{Prefix: netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 9, byte(n >> 8), byte(n)}), 48), Origin: "test"})
	}
	r.device["lo"] = loopback
	r.apply(in)
	for i, f := range families {
		listed := []string{"9.33.44.5", "fd09:212c::5"}[i]
		for _, c := range []struct {
			name    string
			p       packet.Packet
			dir     direction
			outcome policy.Outcome
		}{
			{"egress/known/TCP", f.tcp(packet.ACK), egress, policy.MasqKnown},
			{"egress/known/TCP/moved", f.tcp(packet.ACK).From(f.pod, 999), egress, policy.MasqKnown},
			{"egress/known/UDP", f.udp(), egress, policy.MasqKnown},
			{"ingress/known/TCP", f.tcp(packet.ACK), ingress, policy.MasqKnown},
			{"ingress/known/UDP", f.udp(), ingress, policy.MasqKnown},
			{"egress/known/SCTP", f.sctp(packet.SCTPData), egress, policy.MasqKnown},
			{"egress/known/SCTP/moved", f.sctp(packet.SCTPData).From(f.pod, 999), egress, policy.MasqKnown},
			{"egress/excluded/16384", f.tcp(packet.ACK).To(netip.MustParseAddr(listed), 443), egress, policy.PassNonMasq},
			{"egress/excluded/16384/strangers", f.tcp(packet.ACK).To(netip.MustParseAddr(listed), 443), egress, policy.PassNonMasq},
			{"egress/new/UDP", f.udp(), egress, policy.MasqNew},
		} {
			b.Run(f.name+"/"+c.name, func(b *testing.B) {
				r := r.on(b)
				prog, p, fresh := r.d.objs.EgressEther, c.p, c.outcome == policy.MasqNew
				r.clear()
				copy(r.counts, r.readCounts())
				r.run(egress, "lo", p.Link, p.Build())
				if c.dir == ingress {
					prog, p = r.d.objs.IngressEther, p.From(f.node, p.SrcPort).Reply()
				}
				frame, repeat := p.Build(), 200_000
				// The last two bytes of the addresses.
				source, destination := []int{14, 22}[i], []int{18, 38}[i]
				var random []int
				switch {
				case fresh:
					repeat, random = 20_000, []int{p.HeaderSize(), source}
				case strings.HasSuffix(c.name, "strangers"):
					random = []int{destination}
				}
				base := perPacket(b, again(b, nothing(b), frame, random...), frame, repeat)
				run := again(b, prog, frame, random...)
				var total time.Duration
				rounds := 0
				for b.Loop() {
					total += perPacket(b, run, frame, repeat) - base
					rounds++
					b.StopTimer()
					if fresh {
						r.clear()
					}
					b.StartTimer()
				}
				counts := r.readCounts()
				slot := (int(c.outcome)*2+int(c.dir))*2 + i
				if n := counts[slot] - r.counts[slot]; n < uint64(rounds*repeat) {
					b.Errorf("%d packets were %s, want all", n, c.outcome)
				}
				b.ReportMetric(float64(total.Nanoseconds())/float64(rounds), "ns/packet")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
