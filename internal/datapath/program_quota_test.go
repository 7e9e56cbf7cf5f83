package datapath

import (
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// quotaRig opens flows of a few pods of one family.
type quotaRig struct {
	*rig
	f family
}

func (q quotaRig) flow(pod, port int) packet.Packet {
	p := q.f.tcp(packet.SYN)
	a := q.f.pod.AsSlice()
	a[len(a)-1] += byte(pod)
	p.Src, _ = netip.AddrFromSlice(a)
	p.SrcPort = uint16(port)
	return p
}

func (q quotaRig) open(pod, port int, outcome policy.Outcome) {
	q.t.Helper()
	p := q.flow(pod, port)
	if res := q.run(egress, "eth0", p.Link, p.Build()); res.outcome != outcome {
		q.t.Fatalf("pod %d from port %d: %s, want %s", pod, port, res.outcome, outcome)
	}
}

func (q quotaRig) pod(pod int) (v masqPod) {
	q.t.Helper()
	q.must(q.d.objs.Pods.Lookup(addrTo(q.flow(pod, 1).Src), &v))
	return v
}

func (q quotaRig) share(pods, flows uint32) {
	q.t.Helper()
	q.must(q.d.objs.Shares.Put(uint32(0), masqShare{Pods: [2]uint32{pods, pods}, Flows: [2]uint32{flows, flows}}))
}

func eachQuota(t *testing.T, r *rig, run func(*testing.T, quotaRig)) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) { run(t, quotaRig{r.on(t), f}) })
	}
}

// A pod gets as many mappings as max-ports-per-pod says, whatever the remote, and
// one more when one has ended. Known flows go on, and others are not concerned.
func testQuotaHardLimit(t *testing.T, r *rig) {
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		in := q.familyInput()
		in.MaxPortsPerPod = 3
		q.apply(in)
		for port := range 3 {
			q.open(0, 2000+port, policy.MasqNew)
		}
		q.open(0, 2003, policy.DropQuota)
		q.open(0, 2000, policy.MasqKnown)
		q.open(1, 2003, policy.MasqNew)
		if p := q.pod(0); p.Flows != 3 || p.Refused != 1 {
			t.Errorf("%+v", p)
		}
		q.end(q.flow(0, 2001))
		q.open(0, 2003, policy.MasqNew)
		q.open(0, 2004, policy.DropQuota)
		if p := q.pod(0); p.Flows != 3 || p.Refused != 2 {
			t.Errorf("%+v", p)
		}
	})
}

// end has the reaper take the mapping of a flow away.
func (q quotaRig) end(p packet.Packet) {
	q.t.Helper()
	k := flowKey{netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort), p.Proto}
	reap := reaper{prog: q.d.objs.Reap}
	q.must(reap.add(q.t.Context(), masqReapRecord{Key: k.tuple(), Table: reapForward, Force: 1}))
	q.must(reap.flush(q.t.Context()))
	if reap.removed != 1 {
		q.t.Fatalf("%d mappings ended", reap.removed)
	}
}

// A pod that opens faster than max-new-flows-per-pod is told so; the bucket fills again.
func testQuotaRate(t *testing.T, r *rig) {
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		in := q.familyInput()
		in.NewFlowsPerPod = 5
		q.apply(in)
		passed := 0
		for port := range 40 {
			p := q.flow(0, 2000+port)
			switch out := q.run(egress, "eth0", p.Link, p.Build()).outcome; out {
			case policy.MasqNew:
				passed++
			case policy.DropRate:
			default:
				t.Fatal(out)
			}
		}
		if passed < 5 || passed > 20 { // a burst of one second, and what the test's time adds
			t.Errorf("%d flows passed", passed)
		}
		q.open(1, 2000, policy.MasqNew)
		v := q.pod(0)
		v.FlowsDue -= uint64(time.Second)
		q.must(q.d.objs.Pods.Put(addrTo(q.flow(0, 1).Src), v))
		q.open(0, 3000, policy.MasqNew)
	})
}

// While others want ports too, a pod beyond its share leaves them the upper part
// of the pool, towards every remote; and the table. One that is alone leaves a bit.
func TestQuotaShare(t *testing.T) {
	r := newRigFlows(t, 4096)
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		in := q.familyInput()
		in.Ports = ports(40000, 2500)
		q.apply(in)
		q.share(0, 0)
		defer q.share(0, 0)
		opened := func(pod int) (n int) {
			for port := range 2600 {
				p := q.flow(pod, 2000+port)
				if out := q.run(egress, "eth0", p.Link, p.Build()).outcome; out == policy.MasqNew {
					n++
				}
			}
			return n
		}
		if n := opened(0); n < 2420 || n > 2480 {
			t.Errorf("a pod that is alone has %d of 2500 ports", n)
		}
		for port := range 10 {
			q.open(1, 2000+port, policy.MasqNew)
		}
		q.clear()
		q.share(1, 0) // the next one counts at once, and then there are two
		if n := opened(0); n < 1750 || n > 2200 {
			t.Errorf("a heavy pod has %d of 2500 ports", n)
		}
		for port := range 200 {
			q.open(1, 2000+port, policy.MasqNew)
		}
		q.share(2, 40)
		p := q.flow(0, 9000)
		p.DstPort++
		q.expect(egress, p, policy.DropQuota)
		p = q.flow(1, 9000)
		p.DstPort++
		q.run(egress, "eth0", p.Link, p.Build())
	})
}

// A search that failed is not repeated for a second, nor after a new policy.
func testQuotaRefusalRemembered(t *testing.T, r *rig) {
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		in := q.familyInput()
		in.Ports = ports(40000, 2)
		q.apply(in)
		searches := func() PortSearches {
			t.Helper()
			var s PortSearches
			in, err := Inspect(q.d.opt.Root)
			q.must(err)
			defer in.Close()
			s, err = in.PortSearches()
			q.must(err)
			return s
		}
		q.open(0, 2000, policy.MasqNew)
		q.open(0, 2001, policy.MasqNew)
		before := searches()
		q.open(0, 2002, policy.DropNoPort)
		q.open(0, 2003, policy.DropNoPort)
		after := searches()
		if after.Failures-before.Failures != 1 || after.Remembered-before.Remembered != 1 {
			t.Errorf("before %+v after %+v", before, after)
		}
		// Another remote, another class of ports, another pod: not what was refused.
		p := q.flow(0, 2004)
		p.DstPort++
		q.run(egress, "eth0", p.Link, p.Build())
		q.open(1, 2000, policy.DropNoPort)
		if s := searches(); s.Failures-after.Failures != 1 {
			t.Errorf("%+v, then %+v", after, s)
		}
		var k masqRefused
		var v masqRefusal
		it := q.d.objs.Refusals.Iterate()
		n := 0
		for it.Next(&k, &v) {
			n++
			v.At -= uint64(time.Second)
			q.must(q.d.objs.Refusals.Put(k, v))
		}
		if n != 2 {
			t.Errorf("%d refusals", n)
		}
		after = searches()
		q.open(0, 2002, policy.DropNoPort)
		if s := searches(); s.Failures-after.Failures != 1 {
			t.Errorf("after a second: %+v, then %+v", after, s)
		}
		in.Ports = ports(40000, 3)
		q.reapply(in)
		q.open(0, 2002, policy.MasqNew)
	})
}

// Privileged sources get privileged ports where the pool has any, and nobody else does.
func testPortClass(t *testing.T, r *rig) {
	eachQuota(t, r, func(t *testing.T, q quotaRig) {
		in := q.familyInput()
		in.Ports = append(ports(600, 3), ports(40000, 5)...)
		q.apply(in)
		class := func(pod, source int, low bool) {
			t.Helper()
			p := q.flow(pod, source)
			out := q.translate(p, policy.MasqNew, q.f.node)
			if (out.SrcPort < 1024) != low {
				t.Errorf("source port %d became %d", source, out.SrcPort)
			}
		}
		for i, source := range []int{700, 601, 1023} {
			class(i, source, true)
		}
		for i, source := range []int{1024, 65535, 40001, 5000, 2000} {
			class(i, source, false)
		}
		q.open(3, 800, policy.DropNoPort)
		q.open(3, 8000, policy.DropNoPort)
		in.Ports = ports(40000, 5)
		q.apply(in)
		class(0, 700, false) // there is no other
	})
}
