package datapath

import (
	"math"
	"math/bits"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// BenchmarkRefused gives nanoseconds of a SYN for which there is no port: when the
// failed search is remembered, and when it is made again each time.
func BenchmarkRefused(b *testing.B) {
	r := newRigFlows(b, 1<<16)
	in := r.familyInput()
	in.Ports = ports(32768, 32768)
	in.Devices = []policy.Device{{Name: "lo", Index: loopback, IPv4: families[0].node, IPv6: families[1].node}}
	r.device["lo"] = loopback
	r.apply(in)
	f := families[0]
	for _, port := range in.Ports { // all are another pod's
		k := masqTuple4{Local: addr4To(f.node), Remote: addr4To(f.remote), Lport: swapPort(port), Rport: swapPort(443), Proto: packet.TCP}
		v := masqFlow4{Addr: addr4To(f.pod2)}
		v.Flow.Port, v.Flow.Tag = swapPort(port), flowTag(k)
		r.must(r.d.objs.Reverse4.Put(k, v))
	}
	p := f.tcp(packet.SYN)
	p.Dst, p.DstPort = f.remote, 443
	frame := p.Build()
	for _, c := range []struct {
		name   string
		since  uint64
		repeat int
	}{{"remembered", 0, 100_000}, {"searched", math.MaxUint64, 2000}} {
		b.Run(c.name, func(b *testing.B) {
			r := r.on(b)
			var st masqState
			r.must(r.d.objs.Control.Lookup(uint32(0), &st))
			s := new(masqSetting)
			r.must(r.d.objs.Settings.Lookup(st.Active, s))
			s.Since = c.since
			r.must(r.d.objs.Settings.Put(st.Active, s))
			var total float64
			rounds := 0
			for b.Loop() {
				total += float64(perPacket(b, r.d.objs.EgressEther, frame, c.repeat).Nanoseconds())
				rounds++
			}
			copy(r.counts, r.readCounts())
			if res := r.run(egress, "lo", p.Link, frame); res.outcome != policy.DropNoPort {
				b.Errorf("%s", res.outcome)
			}
			b.ReportMetric(total/float64(rounds), "ns/packet")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// flowTag is flow_tag of bpf/flow.h for IPv4.
func flowTag(k masqTuple4) uint8 {
	h := k.Local ^ k.Remote*0x9e3779b1 ^ bits.ReverseBytes32(0xffff) ^ (uint32(k.Lport)<<16 | uint32(k.Rport)) ^ uint32(k.Proto)
	return uint8(h * 0xc2b2ae35 >> 24)
}
