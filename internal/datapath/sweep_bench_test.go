package datapath

import (
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// BenchmarkSweep100k walks 100,000 established TCP flows to as many remotes, which
// have been idle for longer than all timers but their own.
func BenchmarkSweep100k(b *testing.B) {
	const flows = 100_000
	r := newBench(b, labtest.NewNS(b), Options{DefaultFlows: 131072})
	in := loopPolicy(ports(32768, 32768))
	r.apply(in)
	now, err := monotonicSeconds()
	if err != nil {
		b.Fatal(err)
	}
	external := addr4To(in.Devices[0].IPv4)
	var keys, back [flows]masqTuple4
	var out, reply [flows]masqFlow4
	for i := range flows {
		inner := addr4To(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
		keys[i] = masqTuple4{Local: inner, Remote: uint32(i), Lport: 1, Rport: 2, Proto: policy.ProtoTCP}
		back[i] = masqTuple4{Local: external, Remote: uint32(i), Lport: 1, Rport: 2, Proto: policy.ProtoTCP}
		f := masqFlow{Seen: now - 1000, Created: now - 2000, Packets: 9, Port: 1, Bits: bitSyn | bitData}
		out[i] = masqFlow4{Flow: f, Addr: external}
		reply[i] = masqFlow4{Flow: f, Addr: inner}
	}
	if _, err := r.objs.Forward4.BatchUpdate(keys[:], out[:], nil); err != nil {
		b.Fatal(err)
	}
	if _, err := r.objs.Reverse4.BatchUpdate(back[:], reply[:], nil); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if s := r.sweep(); s.Usage[0].Flows != flows || s.Expired+s.Orphans+s.Vanished != 0 {
			b.Fatalf("%+v", s)
		}
	}
}
