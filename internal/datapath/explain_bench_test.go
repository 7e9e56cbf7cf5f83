package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// BenchmarkExplain asks about one packet, from opening the pins on as the command does, with
// many flows towards others in the tables.
func BenchmarkExplain(b *testing.B) {
	for _, flows := range []int{1000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			size := uint32(1024)
			for size < uint32(flows) {
				size *= 2
			}
			r := newBench(b, labtest.NewNS(b), Options{DefaultFlows: size})
			in := loopPolicy(ports(32768, 32768))
			r.apply(in)
			r.fill(flows, 0, in.Devices[0].IPv4, 0)
			q := Question{Src: netip.MustParseAddrPort("10.0.1.2:50000"), Dst: netip.MustParseAddrPort("192.0.2.77:443"), Proto: policy.ProtoTCP, Device: loopback}
			user, system := cpuTime(b)
			for b.Loop() {
				if a, err := askOnce(r.opt.Root, q); err != nil || a.Outcome != policy.MasqNew {
					b.Fatalf("%+v, %v", a, err)
				}
			}
			u, s := cpuTime(b)
			b.ReportMetric((u-user+s-system).Seconds()*1e3/float64(b.N), "cpu-ms/op")
		})
	}
}

func askOnce(root string, q Question) (Answer, error) {
	in, err := Inspect(root)
	if err != nil {
		return Answer{}, err
	}
	defer in.Close()
	e, err := in.Explain()
	if err != nil {
		return Answer{}, err
	}
	defer e.Close()
	return e.Ask(q)
}
