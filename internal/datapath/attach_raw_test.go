package datapath

import (
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// The programs for devices without a link-layer header are loaded with the first
// such device, attached or taken over, and work on the same flows.
func TestAttachRawDevice(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		b.apply(in)
		if b.raw.Egress != nil || b.raw.Ingress != nil {
			t.Error("loaded without need")
		}
		tun, err := topo.Node.AddTUN("tun0")
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, tun.Close)
		addr, far := netip.MustParseAddr("192.0.2.77"), netip.MustParsePrefix("203.0.113.0/24")
		if err := topo.Node.AddAddr("tun0", netip.PrefixFrom(addr, 32)); err != nil {
			t.Fatal(err)
		}
		if err := topo.Node.AddRoute(lab.Route{Dst: far, Dev: "tun0"}); err != nil {
			t.Fatal(err)
		}
		index, err := topo.Node.Index("tun0")
		if err != nil {
			t.Fatal(err)
		}
		in.Devices = append(in.Devices, policy.Device{Name: "tun0", Index: index, IPv4: addr})
		in.HostAddrs = append(in.HostAddrs, addr)
		for _, step := range []func(){
			func() { b.apply(in) },
			func() { b.close(); b.open() },
		} {
			step()
			if got := b.attachments(); len(got) != 2 || got[1].Device != "tun0" || got[1].Hook != hook {
				t.Errorf("attached %+v", got)
			}
			if b.raw.Egress == nil || b.raw.Ingress == nil {
				t.Error("not loaded")
			}
			checkTUN(t, topo, tun, netip.AddrPortFrom(far.Addr().Next(), 7), addr)
			forward, _ := b.entries()
			if !slices.ContainsFunc(forward, func(e flowEntry) bool { return e.xlate.Addr() == addr }) {
				t.Errorf("not among the flows %+v", forward)
			}
			if err := askAll(t, topo, topo.NodeAddr); err != nil {
				t.Error(err)
			}
			b.forgetFlows()
		}
	})
}

// checkTUN lets a pod ask a server behind a device without a link-layer header, and
// answers with what the packet brought.
func checkTUN(t testing.TB, topo *lab.Topology, tun *os.File, server netip.AddrPort, want netip.Addr) {
	t.Helper()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		buf := make([]byte, 2048)
		tun.SetReadDeadline(time.Now().Add(5 * time.Second))
		for {
			n, err := tun.Read(buf)
			if err != nil {
				t.Errorf("read from the device: %v", err)
				return
			}
			f, ok := lab.ParseIP(buf[:n])
			if !ok || f.Dst != server.Addr() {
				continue // of the kernel's own: router solicitations
			}
			if f.Src != want {
				t.Errorf("left as %s, not as %s", f, want)
			}
			p := buf[:n]
			for i := range 4 { // addresses and ports swapped: the checksums stay
				p[12+i], p[16+i] = p[16+i], p[12+i]
			}
			p[20], p[21], p[22], p[23] = p[22], p[23], p[20], p[21]
			if _, err := tun.Write(p); err != nil {
				t.Errorf("write to the device: %v", err)
			}
			return
		}
	}()
	conn, err := lab.DialUDP(within(t, 5*time.Second), topo.Pods[0], netip.AddrPort{}, server)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	reply := make([]byte, 16)
	if n, err := conn.Read(reply); err != nil || string(reply[:n]) != "hello" {
		t.Errorf("reply %q, %v", reply[:n], err)
	}
	<-answered
}
