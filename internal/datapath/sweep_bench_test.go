package datapath

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// filled is the key of flow number i of those that fill makes.
func filled(i int) masqTuple4 {
	return masqTuple4{Local: addr4To(netip.AddrFrom4([4]byte{10, 0, byte(i >> 2 & 63), byte(i & 3)})),
		Remote: uint32(i), Lport: 1, Rport: 2, Proto: policy.ProtoTCP}
}

// fill makes TCP flows to as many remotes, which have been silent for some seconds. The
// first ones are closed, the others established.
func (b *bench) fill(flows, closed int, external netip.Addr, silent uint32) {
	b.t.Helper()
	now, err := monotonicSeconds()
	if err != nil {
		b.t.Fatal(err)
	}
	const part = 65536
	for from := 0; from < flows; from += part {
		n := min(part, flows-from)
		keys, back := make([]masqTuple4, n), make([]masqTuple4, n)
		out, reply := make([]masqFlow4, n), make([]masqFlow4, n)
		for i := range n {
			k := filled(from + i)
			r := k
			r.Local = addr4To(external)
			f := masqFlow{Seen: now - silent, Created: now - silent, Packets: 9, Port: 1, Bits: bitSyn | bitData}
			if from+i < closed {
				f.Bits |= bitFin
			}
			f.Tag = flowTag(k)
			keys[i], out[i] = k, masqFlow4{Flow: f, Addr: r.Local}
			f.Tag = flowTag(r)
			back[i], reply[i] = r, masqFlow4{Flow: f, Addr: k.Local}
		}
		for m, kv := range map[*ebpf.Map]struct {
			k []masqTuple4
			v []masqFlow4
		}{b.objs.Forward4: {keys, out}, b.objs.Reverse4: {back, reply}} {
			if _, err := m.BatchUpdate(kv.k, kv.v, nil); err != nil {
				b.t.Fatal(err)
			}
		}
	}
}

// BenchmarkSweep walks established TCP flows which have been idle for longer than
// all timers but their own, in a table that just holds them. It reports the CPU time
// of a walk, the kernel's part of it, and what it would be of a minute.
func BenchmarkSweep(b *testing.B) {
	for _, flows := range []int{1000, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			size := uint32(1024)
			for size < uint32(flows) {
				size *= 2
			}
			r := newBench(b, labtest.NewNS(b), Options{DefaultFlows: size})
			in := loopPolicy(ports(32768, 32768))
			r.apply(in)
			r.fill(flows, 0, in.Devices[0].IPv4, 1000)
			r.sweep() // counts the pods
			b.ReportAllocs()
			user, system := cpuTime(b)
			start := time.Now()
			for b.Loop() {
				if s := r.sweep(); s.Usage[0].Flows != flows || s.Expired+s.Orphans+s.Vanished != 0 {
					b.Fatalf("%+v", s)
				}
			}
			wall := time.Since(start)
			u, s := cpuTime(b)
			n := float64(b.N)
			b.ReportMetric((u-user).Seconds()*1e3/n, "user-ms/op")
			b.ReportMetric((s-system).Seconds()*1e3/n, "system-ms/op")
			b.ReportMetric((u-user+s-system).Seconds()/n*60/max(5, wall.Seconds()/n), "cpu-s/min")
			b.ReportMetric(float64(memlock(b, r.objs.Forward4)+memlock(b, r.objs.Reverse4))/float64(size), "bytes/flow4")
			b.ReportMetric(float64(memlock(b, r.objs.Forward6)+memlock(b, r.objs.Reverse6))/float64(size), "bytes/flow6")
			b.ReportMetric(float64(memlock(b, r.objs.Inbound4))/float64(size), "inbound-bytes/flow4")
			b.ReportMetric(float64(memlock(b, r.objs.Inbound6))/float64(size), "inbound-bytes/flow6")
		})
	}
}

func cpuTime(b *testing.B) (user, system time.Duration) {
	b.Helper()
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano()), time.Duration(use.Stime.Nano())
}

// memlock is the memory that the kernel charges for a map.
func memlock(t testing.TB, m *ebpf.Map) (bytes int) {
	t.Helper()
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", m.FD()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(info)) {
		if n, _ := fmt.Sscanf(line, "memlock: %d", &bytes); n == 1 {
			return bytes
		}
	}
	t.Fatalf("no memlock in %s", info)
	return 0
}
