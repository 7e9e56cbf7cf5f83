package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// wire is a node all of whose devices end in the test: eth0 and eth1 lead outside,
// in0 and in1 to the pods. What comes by in0 leaves by eth0, and so with 1. Devices
// without a link layer need no neighbors, and forwarding is done when a write returns.
type wire struct {
	*inNS
	dev map[string]*os.File
}

func newWire(t testing.TB, o Options) *wire {
	t.Helper()
	ns := labtest.NewNS(t)
	w := &wire{dev: make(map[string]*os.File)}
	for _, kv := range [][2]string{
		{"net.ipv4.ip_forward", "1"}, {"net.ipv6.conf.all.forwarding", "1"},
		{"net.ipv6.conf.default.addr_gen_mode", "1"}, // no others than below
	} {
		if err := ns.Sysctl(kv[0], kv[1]); err != nil {
			t.Fatal(err)
		}
	}
	for i, name := range []string{"eth0", "eth1", "in0", "in1"} {
		f, err := ns.AddTUN(name)
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, f.Close)
		w.dev[name] = f
		// Without one the node can't send to link-local addresses, from whatever source.
		if err := ns.AddAddr(name, netip.PrefixFrom(nodeLinkLocal, 64)); err != nil {
			t.Fatal(err)
		}
		for _, dst := range []netip.Prefix{lab.DefaultRoute4, lab.DefaultRoute6} {
			// What the node itself sends names its device.
			if err := ns.AddRoute(lab.Route{Dst: dst, Dev: name, Metric: 100 + i}); err != nil {
				t.Fatal(err)
			}
			if err := ns.AddRoute(lab.Route{Dst: dst, Dev: name, Table: 100 + i}); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.inNS = tables(t, ns, o)
	for from, to := range map[string]int{"in0": 100, "in1": 101, "eth0": 102, "eth1": 102} {
		w.do(func() error {
			for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
				rule := netlink.NewRule()
				rule.IifName, rule.Table, rule.Family = from, to, family
				if err := netlink.RuleAdd(rule); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return w
}

// forget ends all connections.
func (w *wire) forget() {
	w.t.Helper()
	w.do(func() error { return netlink.ConntrackTableFlush(netlink.ConntrackTable) })
}

// arrive lets packets come in by a device.
func (w *wire) arrive(dev string, p packet.Packet) {
	w.t.Helper()
	p.Link = packet.Raw
	if _, err := w.dev[dev].Write(p.Build()); err != nil {
		w.t.Fatal(err)
	}
}

// send sends a packet of the node by a device; header and all are as given.
func (w *wire) send(dev string, p packet.Packet) {
	w.t.Helper()
	p.Link = packet.Raw
	w.do(func() error {
		family := unix.AF_INET
		var to unix.Sockaddr
		if p.Dst.Is4() {
			to = &unix.SockaddrInet4{Addr: p.Dst.As4()}
		} else {
			link, err := netlink.LinkByName(dev)
			if err != nil {
				return err
			}
			family, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: p.Dst.As16(), ZoneId: uint32(link.Attrs().Index)}
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		err = errors.Join(
			unix.BindToDevice(fd, dev),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
		if err == nil {
			err = unix.Sendto(fd, p.Build(), 0, to)
		}
		if errors.Is(err, unix.EPERM) {
			return nil // what netfilter says to the sender of what it drops
		}
		if err != nil {
			return fmt.Errorf("send %s > %s: %w", p.Src, p.Dst, err)
		}
		return nil
	})
}

// sentinel is a packet that leaves by eth0 or eth1 whatever the policy of a test.
var sentinelTo = netip.MustParseAddr("203.0.113.251")

var (
	mldReports    = netip.MustParseAddr("ff02::16")
	nodeLinkLocal = netip.MustParseAddr("fe80::99")
)

// left returns what left by a device before a packet that is sent now.
func (w *wire) left(dev string) [][]byte {
	w.t.Helper()
	in := map[string]string{"eth0": "in0", "eth1": "in1", "in0": "eth0"}[dev]
	w.arrive(in, packet.Packet{Src: netip.MustParseAddr("203.0.113.250"), Dst: sentinelTo, Proto: packet.UDP, SrcPort: 50000, DstPort: 9})
	var packets [][]byte
	buf := make([]byte, 1<<16)
	for {
		w.dev[dev].SetReadDeadline(time.Now().Add(labtest.Patience(5 * time.Second)))
		n, err := w.dev[dev].Read(buf)
		if err != nil {
			w.t.Fatalf("%s: what must leave does not: %v", dev, err)
		}
		b := buf[:n]
		f, ok := lab.ParseIP(b)
		switch {
		case ok && f.Dst == sentinelTo:
			return packets
		case ok && f.Dst == mldReports && (f.Src.IsUnspecified() || f.Src == nodeLinkLocal):
			continue // the node's own
		}
		packets = append(packets, append([]byte(nil), b...))
	}
}

// counters are the rules of our chains with packets, of a table.
func (n *inNS) counters(f Family, table string) string {
	n.t.Helper()
	var out string
	n.do(func() (err error) {
		out, err = n.o.run(context.Background(), n.o.find(n.ipt(f, "-save")), "", "-c", "-t", table)
		return err
	})
	return out
}
