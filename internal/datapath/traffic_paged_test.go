package datapath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// Headers need not be in the linear part of a packet. What arrives here has all but
// the Ethernet header in a page. What leaves has in the linear part what forwarding
// reads: not the header of ICMP.
func TestPagedHeaders(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{})
	const jumbo = 9000 // smaller packets are linear
	for _, end := range []struct {
		ns  *lab.NS
		dev string
	}{{topo.Pods[0], "eth0"}, {topo.Node, "pod0"}, {topo.Node, "eth0"}, {topo.World, "eth0"}} {
		if err := end.ns.SetMTU(end.dev, jumbo); err != nil {
			t.Fatal(err)
		}
	}
	d := newBench(t, topo.Node, Options{})
	d.apply(nodePolicy(t, topo))
	world := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true})
	pod := labtest.Capture(t, topo.Pods[0], "eth0", lab.CaptureOptions{Incoming: true})
	arrives := func(c *lab.Capture, p packet.Packet) {
		t.Helper()
		p.Hops = 63
		want := p.Build()[14:]
		labtest.Eventually(t, 5*time.Second, func() error {
			for _, got := range c.Packets() {
				if bytes.Equal(got.Data[14:], want) {
					return nil
				}
			}
			return fmt.Errorf("no %s among %d packets", show(p), len(c.Packets()))
		})
	}
	for i, node := range topo.NodeAddr.All() {
		for _, p := range []packet.Packet{
			{Proto: packet.ICMP, Type: 8},
			{Proto: packet.UDP, DstPort: 5300},
			{Proto: packet.TCP, DstPort: 5300, Flags: packet.SYN},
		} {
			if p.Proto == packet.ICMP && i == 1 {
				p.Proto, p.Type = packet.ICMPv6, 128
			}
			p = p.From(topo.PodAddrs[0].All()[i], 40000)
			p.Dst, p.Payload = topo.WorldAddr.All()[i], bytes.Repeat([]byte("paged"), 1000)
			out := p.From(node, 40000)
			sendPaged(t, topo.Pods[0], topo.Node, "pod0", p.Build())
			arrives(world, out)
			sendPaged(t, topo.World, topo.Node, "eth0", out.Reply().Build())
			arrives(pod, p.Reply())
		}
	}
}

// sendPaged sends a frame from a namespace's eth0 to a device of another, with only
// the Ethernet header in the linear part.
func sendPaged(t *testing.T, from, to *lab.NS, dev string, frame []byte) {
	t.Helper()
	mac, err := to.MAC(dev)
	if err != nil {
		t.Fatal(err)
	}
	copy(frame, mac)
	index, err := from.Index("eth0")
	if err != nil {
		t.Fatal(err)
	}
	header := make([]byte, 10)                    // struct virtio_net_hdr
	binary.NativeEndian.PutUint16(header[2:], 14) // hdr_len
	err = from.Do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
			return err
		}
		return unix.Sendto(fd, append(header, frame...), 0, &unix.SockaddrLinklayer{Ifindex: index})
	})
	if err != nil {
		t.Fatal(err)
	}
}
