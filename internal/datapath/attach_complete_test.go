package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// CHECKSUM_COMPLETE: skb->csum is the sum of the whole packet, kept by the network
// card, and every change of the packet has to be one of the sum too. Otherwise the
// kernel says "hw csum failure" and sums the packet again. No card is needed to see
// it: the kernel makes such packets of what a tunnel with a checksum carries. The
// helper that every eBPF translator uses was wrong here for IPv6 until kernel 6.16.
func TestChecksumComplete(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	for name, without := range map[string][]Feature{"all": nil, "without the IPv6 flag": {CsumIPv6}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testChecksumComplete(t, without)
		})
	}
}

func testChecksumComplete(t *testing.T, without []Feature) {
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{Without: without})
	node := lab.Pair{V4: netip.MustParseAddr("198.18.5.1"), V6: netip.MustParseAddr("2001:db8:5::1")}
	world := lab.Pair{V4: netip.MustParseAddr("198.18.5.2"), V6: netip.MustParseAddr("2001:db8:5::2")}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, end := range []struct {
		ns            *lab.NS
		local, remote netip.Addr
		addr          lab.Pair
	}{{topo.Node, topo.NodeAddr.V6, topo.WorldAddr.V6, node}, {topo.World, topo.WorldAddr.V6, topo.NodeAddr.V6, world}} {
		must(end.ns.AddVXLAN("vx0", 7, end.local, end.remote))
		must(end.ns.SetMTU("vx0", 1400))
		must(end.ns.AddAddr("vx0", netip.PrefixFrom(end.addr.V4, 24)))
		must(end.ns.AddAddr("vx0", netip.PrefixFrom(end.addr.V6, 64)))
		// The outer checksum has to be on the wire, or there is nothing to be summed.
		must(end.ns.SetOffload("eth0", false, lab.AllOffloads...))
	}
	must(topo.Pods[0].SetMTU("eth0", 1400)) // so that no MTU has to be learnt
	in := nodePolicy(t, topo)
	index, err := topo.Node.Index("vx0")
	must(err)
	in.Devices = []policy.Device{{Name: "vx0", Index: index, Ethernet: true, IPv4: node.V4, IPv6: node.V6}}
	in.HostAddrs = append(in.HostAddrs, node.All()...)
	b.apply(in)
	o := observe(t, topo.Node, index)
	for _, dst := range world.All() {
		for _, c := range []struct {
			name string
			ask  func(*testing.T, *lab.Topology, netip.Addr) error
		}{
			{"udp", func(t *testing.T, topo *lab.Topology, dst netip.Addr) error { return askUDP(t, topo, dst, 100, false) }},
			{"udp without checksum", func(t *testing.T, topo *lab.Topology, dst netip.Addr) error { return askUDP(t, topo, dst, 100, true) }},
			{"fragments", func(t *testing.T, topo *lab.Topology, dst netip.Addr) error { return askUDP(t, topo, dst, 3000, false) }},
			{"fragments without checksum", func(t *testing.T, topo *lab.Topology, dst netip.Addr) error { return askUDP(t, topo, dst, 3000, true) }},
			{heldFragments, askReversed},
			{"tcp", askOnceTCP},
			{"ping", func(t *testing.T, topo *lab.Topology, dst netip.Addr) error {
				_, err := lab.Ping(within(t, 5*time.Second), topo.Pods[0], dst, 7, 1, 100)
				return err
			}},
			{"icmp error", askClosedPort},
			{"protocol 253", askBare},
		} {
			if err := c.ask(t, topo, dst); err != nil {
				t.Errorf("%s of %s: %v", c.name, dst, err)
			}
			// Packets whose size was changed have no sum any more, at least in current kernels.
			o.check(t, fmt.Sprintf("%s of %s", c.name, dst), c.name == heldFragments)
		}
	}
}

// podPort is outside the pool, so that the port is translated too.
const podPort = 20000

// podAndServer are a server in the world and a socket of the pod that talks to it,
// both with a deadline.
func podAndServer(t *testing.T, topo *lab.Topology, dst netip.Addr) (srv, c *net.UDPConn, err error) {
	srv, err = lab.ListenUDP(topo.World, netip.AddrPortFrom(dst, 0))
	if err != nil {
		return nil, nil, err
	}
	at := srv.LocalAddr().(*net.UDPAddr).AddrPort()
	c, err = lab.DialUDP(t.Context(), topo.Pods[0], netip.AddrPortFrom(topo.PodAddrs[0].Of(dst), podPort), at)
	if err != nil {
		srv.Close()
		return nil, nil, err
	}
	srv.SetDeadline(time.Now().Add(5 * time.Second))
	c.SetDeadline(time.Now().Add(5 * time.Second))
	return srv, c, nil
}

func askUDP(t *testing.T, topo *lab.Topology, dst netip.Addr, size int, noChecksum bool) error {
	srv, c, err := podAndServer(t, topo, dst)
	if err != nil {
		return err
	}
	defer srv.Close()
	defer c.Close()
	if noChecksum {
		for _, s := range []*net.UDPConn{srv, c} {
			if err := withoutChecksum(s, dst); err != nil {
				return err
			}
		}
	}
	buf := make([]byte, 4096)
	if _, err := c.Write(buf[:size]); err != nil {
		return err
	}
	n, from, err := srv.ReadFromUDPAddrPort(buf)
	if err != nil {
		return err
	}
	if from.Port() == podPort {
		return fmt.Errorf("the port was kept")
	}
	if _, err := srv.WriteToUDPAddrPort(buf[:n], from); err != nil {
		return err
	}
	_, err = c.Read(buf)
	return err
}

const heldFragments = "fragments reversed"

// askReversed answers with fragments of which the last comes first.
func askReversed(t *testing.T, topo *lab.Topology, dst netip.Addr) error {
	srv, c, err := podAndServer(t, topo, dst)
	if err != nil {
		return err
	}
	defer srv.Close()
	defer c.Close()
	buf := make([]byte, 4096)
	if _, err := c.Write(buf[:100]); err != nil {
		return err
	}
	_, from, err := srv.ReadFromUDPAddrPort(buf)
	if err != nil {
		return err
	}
	p := packet.Packet{Link: packet.Raw, Src: dst, Dst: from.Addr(), Proto: packet.UDP, SrcPort: c.RemoteAddr().(*net.UDPAddr).AddrPort().Port(), DstPort: from.Port(), ID: 4711,
		Payload: slices.Repeat([]byte("held"), 750)}
	pieces := p.Fragments(1304)
	slices.Reverse(pieces)
	for _, b := range pieces {
		if err := sendRaw(topo.World, from.Addr(), b); err != nil {
			return err
		}
	}
	n, err := c.Read(buf)
	if err == nil && !bytes.Equal(buf[:n], p.Payload) {
		err = errors.New("altered")
	}
	return err
}

// sendRaw sends an IP packet as it is.
func sendRaw(ns *lab.NS, dst netip.Addr, b []byte) error {
	return ns.Do(func() error {
		domain, to := unix.AF_INET, unix.Sockaddr(nil)
		if dst.Is4() {
			to = &unix.SockaddrInet4{Addr: dst.As4()}
		} else {
			domain, to = unix.AF_INET6, &unix.SockaddrInet6{Addr: dst.As16()}
		}
		fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, b, 0, to)
	})
}

func withoutChecksum(c *net.UDPConn, a netip.Addr) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	raw.Control(func(fd uintptr) {
		if a.Is4() {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1)
			return
		}
		const udpNoCheck6TX, udpNoCheck6RX = 101, 102
		err = errors.Join(unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, udpNoCheck6TX, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, udpNoCheck6RX, 1))
	})
	return err
}

func askOnceTCP(t *testing.T, topo *lab.Topology, dst netip.Addr) error {
	s, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(dst, 0))
	if err != nil {
		return err
	}
	defer s.Close()
	_, c, err := lab.AskTCP(within(t, 5*time.Second), topo.Pods[0], netip.AddrPortFrom(topo.PodAddrs[0].Of(dst), podPort), s.Addr)
	if err == nil {
		c.Close()
	}
	return err
}

// askClosedPort expects that the world refuses.
func askClosedPort(t *testing.T, topo *lab.Topology, dst netip.Addr) error {
	c, err := lab.DialUDP(t.Context(), topo.Pods[0], netip.AddrPortFrom(topo.PodAddrs[0].Of(dst), podPort), netip.AddrPortFrom(dst, 9))
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 16)); !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("want it refused: %v", err)
	}
	return nil
}

// askBare exchanges packets of a protocol without ports.
func askBare(t *testing.T, topo *lab.Topology, dst netip.Addr) error {
	network := "ip4:253"
	if dst.Is6() {
		network = "ip6:253"
	}
	srv, err := lab.ListenPacket(topo.World, net.ListenConfig{}, network, dst.String())
	if err != nil {
		return err
	}
	defer srv.Close()
	c, err := lab.ListenPacket(topo.Pods[0], net.ListenConfig{}, network, topo.PodAddrs[0].Of(dst).String())
	if err != nil {
		return err
	}
	defer c.Close()
	buf := make([]byte, 256)
	if _, err := c.WriteTo(buf[:99], &net.IPAddr{IP: dst.AsSlice()}); err != nil {
		return err
	}
	n, from, err := srv.ReadFrom(buf)
	if err != nil {
		return err
	}
	if _, err := srv.WriteTo(buf[:n], from); err != nil {
		return err
	}
	_, _, err = c.ReadFrom(buf)
	return err
}

// observer sees what our programs hand on at ingress of a device.
type observer struct{ queue *ebpf.Map }

const observedBytes = 2048

// observe attaches a program behind ours that notes skb->csum, which only
// CHECKSUM_COMPLETE has, and the packet.
func observe(t *testing.T, ns *lab.NS, index int) *observer {
	t.Helper()
	newMap := func(spec *ebpf.MapSpec) *ebpf.Map {
		m, err := ebpf.NewMap(spec)
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, m.Close)
		return m
	}
	const csumAt, lengthAt, dataAt = 0, 8, 16
	room := newMap(&ebpf.MapSpec{Type: ebpf.PerCPUArray, KeySize: 4, ValueSize: dataAt + observedBytes, MaxEntries: 1})
	queue := newMap(&ebpf.MapSpec{Type: ebpf.Queue, ValueSize: dataAt + observedBytes, MaxEntries: 256})
	const lenOfSkb = 0
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, room.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(asm.R7, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.FnCsumUpdate.Call(), // of no change: the sum, or -ENOTSUPP without CHECKSUM_COMPLETE
		asm.StoreMem(asm.R7, csumAt, asm.R0, asm.DWord),
		asm.LoadMem(asm.R4, asm.R6, lenOfSkb, asm.Word),
		asm.StoreMem(asm.R7, lengthAt, asm.R4, asm.DWord),
		asm.JLT.Imm(asm.R4, 1, "out"),
		asm.JGT.Imm(asm.R4, observedBytes, "out"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Mov.Imm(asm.R2, 0),
		asm.Mov.Reg(asm.R3, asm.R7),
		asm.Add.Imm(asm.R3, dataAt),
		asm.FnSkbLoadBytes.Call(),
		asm.LoadMapPtr(asm.R1, queue.FD()),
		asm.Mov.Reg(asm.R2, asm.R7),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnMapPushElem.Call(),
		asm.Mov.Imm(asm.R0, -1).WithSymbol("out"), // TCX_NEXT
		asm.Return(),
	}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	labtest.Close(t, prog.Close)
	err = ns.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Tail()})
		if err == nil {
			labtest.Close(t, l.Close)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return &observer{queue}
}

// check compares the sums of all packets for the pod seen since the last call with
// their bytes. There must be one: all have come through the tunnel.
func (o *observer) check(t *testing.T, what string, orNone bool) {
	t.Helper()
	n := 0
	for {
		v := make([]byte, 16+observedBytes)
		if err := o.queue.LookupAndDelete(nil, &v); errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		csum, size := int64(binary.NativeEndian.Uint64(v)), binary.NativeEndian.Uint64(v[8:])
		ip := v[16+14 : 16+size]
		f, ok := lab.ParseIP(ip)
		if !ok || !lab.PodRange4.Contains(f.Dst) && !lab.PodRange6.Contains(f.Dst) {
			continue
		}
		if csum < 0 && orNone {
			continue
		}
		if csum < 0 {
			t.Errorf("%s: %s has no complete checksum: %v", what, f, unix.Errno(-csum))
			continue
		}
		n++
		// In memory order on both sides (RFC 1071 section 2): little endian.
		sum := uint32(csum)
		sum = sum&0xffff + sum>>16
		sum = sum&0xffff + sum>>16
		var b [2]byte
		binary.LittleEndian.PutUint16(b[:], uint16(sum))
		if got, want := binary.BigEndian.Uint16(b[:]), packet.Sum(0, ip); got%0xffff != want%0xffff {
			t.Errorf("%s: %s sums up to %#04x, and skb->csum says %#04x", what, f, want, got)
		}
	}
	if n == 0 && !orNone {
		t.Errorf("%s: no packet with a complete checksum", what)
	}
}
