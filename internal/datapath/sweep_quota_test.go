package datapath

import (
	"fmt"
	"net/netip"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// checkPods compares the books of the programs with the flows there are.
func (b *bench) checkPods() error {
	b.t.Helper()
	forward, _ := b.entries()
	want := make(map[netip.Addr]int)
	for _, e := range forward {
		want[e.key.local.Addr()]++
	}
	for a, n := range want {
		var pod masqPod
		if err := b.objs.Pods.Lookup(addrTo(a), &pod); err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
		if int(int32(pod.Flows)) != n {
			return fmt.Errorf("%s: %d flows counted, there are %d", a, int32(pod.Flows), n)
		}
	}
	return nil
}

// The walk corrects what the programs counted, removes who is idle, and says what a
// fair share is.
func TestSweepQuota(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 4096})
	b.apply(loopPolicy(ports(40000, 3000)))
	b.open1(t, tcpFlow, 1500) // two pods
	b.open1(t, tcpFlow6, 20)
	if err := b.checkPods(); err != nil {
		t.Error(err)
	}
	b.sweep()
	share := func() (s masqShare) {
		t.Helper()
		if err := b.objs.Shares.Lookup(uint32(0), &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	// Below the low-water mark there is room for 1367 more than the larger one has.
	if s, want := share(), (masqShare{Pods: [2]uint32{2, 1}, Flows: [2]uint32{2367, 0}}); s != want {
		t.Errorf("shares %+v, want %+v", s, want)
	}
	for i, wrong := range []int32{-7, 5000} {
		a := addrTo(tcpFlow(i * 1000).Src)
		if err := b.objs.Pods.Put(a, masqPod{Flows: uint32(wrong)}); err != nil {
			t.Fatal(err)
		}
	}
	b.sweep()
	if b.checkPods() == nil {
		t.Error("one walk alone was believed")
	}
	b.sweep()
	if err := b.checkPods(); err != nil {
		t.Error(err)
	}
	if err := b.objs.Pods.Delete(addrTo(tcpFlow(0).Src)); err != nil {
		t.Fatal(err)
	}
	b.sweep()
	if err := b.checkPods(); err != nil {
		t.Error(err)
	}
	b.forgetFlows()
	b.sweep()
	var pod masqPod
	if err := b.objs.Pods.Lookup(addrTo(tcpFlow(0).Src), &pod); err == nil {
		t.Errorf("still there without a flow: %+v", pod)
	}
	if s := share(); s != (masqShare{}) {
		t.Errorf("shares of nobody: %+v", s)
	}
}

// Flows that are made and end while the walk goes on are counted all the same.
func TestSweepQuotaWhileFlowsGoOn(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{DefaultFlows: 16384})
	b.apply(loopPolicy(ports(30000, 32768)))
	progs := b.programs()
	parallel(t, b, 3, func(thread int) error {
		for i := range 4000 {
			if thread == 2 {
				if i%40 == 0 {
					if _, err := b.Walk(t.Context()); err != nil {
						return err
					}
				}
				continue
			}
			if _, _, err := progs.send(tcpFlow(4000*thread + i)); err != nil {
				return err
			}
		}
		return nil
	})
	if n := b.count(policy.MasqNew); n != 8000 {
		t.Fatalf("%d flows", n)
	}
	b.sweep()
	b.sweep()
	if err := b.checkPods(); err != nil {
		t.Error(err)
	}
}
