package datapath

import (
	"maps"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

// What a scraper reads agrees with the tables, and the walk counts flows by protocol.
func TestMeter(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 4096})
	b.apply(loopPolicy(ports(40000, 3000)))
	b.open1(t, tcpFlow, 1500) // two pods
	b.open1(t, tcpFlow6, 20)
	swept := b.sweep()
	if want := [2]map[uint8]int{{6: 1500}, {6: 20}}; !maps.Equal(swept.Protos[0], want[0]) || !maps.Equal(swept.Protos[1], want[1]) {
		t.Errorf("by protocol %v, want %v", swept.Protos, want)
	}
	b.inspect(func(in *Inspector) error {
		limits := in.Limits()
		if want := (Usage{Limit: 4096, InboundLimit: 1024}); limits != [2]Usage{want, want} {
			t.Errorf("limits %+v, want twice %+v", limits, want)
		}
		pods, err := in.Pods(2)
		first, second := tcpFlow(0).Src, tcpFlow(1000).Src
		if err != nil || len(pods) != 2 || pods[0] != (Pod{first, 1000, 0}) || pods[1] != (Pod{second, 500, 0}) {
			t.Errorf("largest pods %+v %v, want %s with 1000 and %s with 500", pods, err, first, second)
		}
		all, err := in.Pods(100)
		if err != nil || len(all) != 3 || all[2].Flows != 20 {
			t.Errorf("pods %+v %v", all, err)
		}
		n, err := in.Reclaimed()
		if n != 0 {
			t.Errorf("%d reclaimed while an agent ran", n)
		}
		return err
	})
}
