package datapath

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// BenchmarkTraffic gives nanoseconds a run of the attached programs under real traffic
// of a pod, by the kernel's own account (which reads the clock twice a run).
func BenchmarkTraffic(b *testing.B) {
	topo := labtest.NewNode(b, lab.Options{})
	d := newBench(b, topo.Node, Options{DefaultFlows: 1 << 17})
	d.apply(nodePolicy(b, topo))
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		b.Fatal(err)
	}
	defer stats.Close()
	for i, family := range []string{"IPv4", "IPv6"} {
		server := topo.WorldAddr.All()[i]
		for _, c := range []struct {
			name string
			run  func(*testing.B, *lab.Topology, netip.Addr)
		}{
			{"UDP/1", func(b *testing.B, topo *lab.Topology, a netip.Addr) { udpFlows(b, topo, a, 1) }},
			{"UDP/256", func(b *testing.B, topo *lab.Topology, a netip.Addr) { udpFlows(b, topo, a, 256) }},
			{"TCP/stream", tcpStream},
			{"TCP/request", func(b *testing.B, topo *lab.Topology, a netip.Addr) { tcpRequests(b, topo, a, 1, 20_000) }},
			{"TCP/connect", func(b *testing.B, topo *lab.Topology, a netip.Addr) { tcpRequests(b, topo, a, 2000, 1) }},
		} {
			b.Run(family+"/"+c.name, func(b *testing.B) {
				out, in := d.meter(b, d.objs.EgressEther), d.meter(b, d.objs.IngressEther)
				for b.Loop() {
					c.run(b, topo, server)
				}
				out("egress")
				in("ingress")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

// meter starts to count; the function that it returns reports.
func (*bench) meter(b *testing.B, prog *ebpf.Program) func(name string) {
	read := func() *ebpf.ProgramStats {
		s, err := prog.Stats()
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
	before := read()
	return func(name string) {
		after := read()
		runs := after.RunCount - before.RunCount
		if runs < 1000 {
			b.Errorf("%s: %d runs only", name, runs)
		}
		b.ReportMetric(float64(after.Runtime-before.Runtime)/float64(max(runs, 1)), name+"-ns/run")
	}
}

// udpFlows sends datagrams both ways in turn, in bursts that sockets can hold.
func udpFlows(b *testing.B, topo *lab.Topology, server netip.Addr, flows int) {
	const packets, burst = 100_000, 64
	deadline := time.Now().Add(30 * time.Second)
	l, err := lab.ListenUDP(topo.World, netip.AddrPortFrom(server, 0))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	l.SetDeadline(deadline)
	conns, peers := make([]*net.UDPConn, flows), make([]netip.AddrPort, flows)
	buf := make([]byte, 64)
	for i := range conns {
		if conns[i], err = lab.DialUDP(within(b, 5*time.Second), topo.Pods[0], netip.AddrPort{}, l.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
			b.Fatal(err)
		}
		defer conns[i].Close()
		conns[i].SetDeadline(deadline)
		if _, err := conns[i].Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, peers[i], err = l.ReadFromUDPAddrPort(buf); err != nil {
			b.Fatal(err)
		}
	}
	for sent := 0; sent < packets; sent += burst {
		for n := range burst {
			if _, err := conns[(sent+n)%flows].Write(buf); err != nil {
				b.Fatal(err)
			}
		}
		for n := range burst {
			if _, err := l.Read(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := l.WriteToUDPAddrPort(buf, peers[(sent+n)%flows]); err != nil {
				b.Fatal(err)
			}
		}
		for n := range burst {
			if _, err := conns[(sent+n)%flows].Read(buf); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// tcpStream sends 256 MB, mostly in packets that the pod's kernel did not cut.
func tcpStream(b *testing.B, topo *lab.Topology, server netip.Addr) {
	s, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(server, 0))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	_, c, err := lab.AskTCP(within(b, 5*time.Second), topo.Pods[0], netip.AddrPort{}, s.Addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	go func() {
		io.CopyN(c, zeros{}, 256<<20) // an error shows at the other end
		c.CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, c); err != nil || n != 256<<20 {
		b.Fatalf("%d bytes came back: %v", n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// tcpRequests sends small requests on connections one after the other.
func tcpRequests(b *testing.B, topo *lab.Topology, server netip.Addr, connections, requests int) {
	s, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(server, 0))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	buf := make([]byte, 16)
	for range connections {
		_, c, err := lab.AskTCP(within(b, 30*time.Second), topo.Pods[0], netip.AddrPort{}, s.Addr)
		if err != nil {
			b.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(30 * time.Second))
		for range requests {
			if _, err := c.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(c, buf); err != nil {
				b.Fatal(err)
			}
		}
		c.Close()
	}
}
