package lab_test

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// pairOf is two namespaces, 10.9.0.1 and 10.9.0.2, without IPv6 noise.
func pairOf(t *testing.T, o lab.LinkOpts) (a, b *lab.NS) {
	t.Helper()
	a, b = labtest.NewNS(t), labtest.NewNS(t)
	for _, ns := range []*lab.NS{a, b} {
		if err := ns.Sysctl("net.ipv6.conf.default.disable_ipv6", "1"); err != nil {
			t.Fatal(err)
		}
	}
	o.AddrsA = []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}
	o.AddrsB = []netip.Prefix{netip.MustParsePrefix("10.9.0.2/24")}
	link(t, a, b, o)
	return a, b
}

var addrB = netip.MustParseAddr("10.9.0.2")

func TestCaptureCountsWhatItForgot(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, lab.LinkOpts{})
	c := labtest.Capture(t, b, "v0", lab.CaptureOptions{MaxPackets: 8, SnapLen: 50})
	seqOf := func(p lab.Packet) int {
		f, _ := lab.ParseFrame(p.Data)
		typ, _, _, ok := f.ICMP()
		if !ok || typ != 8 {
			return -1
		}
		return int(binary.BigEndian.Uint16(f.L4[6:]))
	}
	requests := c.Count(func(p lab.Packet) bool { return seqOf(p) >= 0 })
	out := c.Count(func(p lab.Packet) bool { return p.Outgoing })
	const total = 100
	for seq := range total {
		if _, err := lab.Ping(within(t, 5*time.Second), a, addrB, 9, uint16(seq), 56); err != nil {
			t.Fatal(err)
		}
	}
	// An answer has come for each, so each was on the wire: no waiting here.
	if n := requests.N(); n != total {
		t.Errorf("%d requests counted, want %d", n, total)
	}
	if n := out.N(); n < total {
		t.Errorf("%d outgoing packets counted, want the %d replies", n, total)
	}
	packets := c.Packets()
	if len(packets) != 8 {
		t.Errorf("%d packets remembered, want 8", len(packets))
	}
	last := -1
	for _, p := range packets {
		if len(p.Data) > 50 {
			t.Errorf("%d bytes remembered, want 50", len(p.Data))
		}
		if s := seqOf(p); s >= 0 && s <= last {
			t.Errorf("request %d after %d: not the oldest first", s, last)
		} else if s >= 0 {
			last = s
		}
	}
	if last != total-1 {
		t.Errorf("last request remembered is %d", last)
	}
	if late := c.Count(func(p lab.Packet) bool { return true }); late.N() != 8 {
		t.Errorf("a late counter starts at %d, want the 8 remembered", late.N())
	}
	c.Stop()
	c.Stop()
	if requests.N() != total || len(c.Packets()) != 8 || c.Lost() != 0 {
		t.Error("the capture changed by being stopped")
	}
}

func TestCaptureSurvivesItsDevice(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, lab.LinkOpts{})
	c := labtest.Capture(t, b, "v0", lab.CaptureOptions{})
	for seq := range uint16(2) {
		if _, err := lab.Ping(within(t, 5*time.Second), a, addrB, 9, seq, 56); err != nil {
			t.Fatal(err)
		}
		before := len(c.Packets())
		if before == 0 {
			t.Error("nothing captured")
		}
		if err := b.SetDown("v0"); err != nil {
			t.Fatal(err)
		}
		if err := b.SetUp("v0"); err != nil {
			t.Fatal(err)
		}
		if after := len(c.Packets()); after < before {
			t.Errorf("%d packets, then %d", before, after)
		}
	}
	if err := b.DeleteLink("v0"); err != nil {
		t.Fatal(err)
	}
	if len(c.Packets()) < 4 {
		t.Error("requests and replies around the device's going down are missing")
	}
	if _, err := lab.StartCapture(b, "v0", lab.CaptureOptions{}); err == nil {
		t.Error("a capture started on a deleted device")
	}
}

// With NoOffload the wire shows what a real wire would.
func TestNoOffloadShowsWirePackets(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, lab.LinkOpts{NoOffload: true})
	c := labtest.Capture(t, a, "v0", lab.CaptureOptions{Incoming: true, MaxPackets: 1 << 14})
	s, err := lab.ServeContent(b, netip.AddrPortFrom(addrB, 80))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, s.Close)
	seed := labtest.Rand(t).Uint64()
	if _, err := lab.Fetch(within(t, 20*time.Second), a, s.Addr, seed, 4<<20); err != nil {
		t.Fatal(err)
	}
	segments := 0
	for _, p := range c.Packets() {
		f, ok := lab.ParseFrame(p.Data)
		if !ok || f.Proto != 6 {
			continue
		}
		segments++
		if len(p.Data) > 1514 {
			t.Fatalf("%d bytes on the wire: %s", len(p.Data), f)
		}
		if sum := tcpChecksum(f); sum != 0 {
			t.Fatalf("checksum off by %#x: %s", sum, f)
		}
	}
	if segments < 4<<20/1460 {
		t.Errorf("%d segments for 4 MiB", segments)
	}
	if n := c.Lost(); n != 0 {
		t.Errorf("%d packets lost", n)
	}
}

// tcpChecksum is zero for a segment with a right checksum.
func tcpChecksum(f lab.Frame) uint16 {
	b := append(f.Src.AsSlice(), f.Dst.AsSlice()...)
	b = append(b, 0, f.Proto)
	b = binary.BigEndian.AppendUint16(b, uint16(len(f.L4)))
	b = append(b, f.L4...)
	if len(b)%2 == 1 {
		b = append(b, 0)
	}
	var sum uint32
	for ; len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func TestPingTellsErrorFromSilence(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, lab.LinkOpts{})
	if err := b.Sysctl("net.ipv4.icmp_echo_ignore_all", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Ping(within(t, 200*time.Millisecond), a, addrB, 1, 1, 8); err == nil || !isTimeout(err) {
		t.Errorf("ping of a silent host: %v, want a time-out", err)
	}
	if _, err := lab.Ping(within(t, time.Second), a, netip.MustParseAddr("10.10.0.1"), 1, 1, 8); err == nil || isTimeout(err) {
		t.Errorf("ping without a route: %v, want an error at once", err)
	}
	c, err := lab.DialUDP(t.Context(), a, netip.AddrPort{}, netip.AddrPortFrom(addrB, 9))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := lab.AskUDPOn(within(t, 5*time.Second), c, nil); err == nil || isTimeout(err) {
		t.Errorf("udp to a closed port: %v, want connection refused", err)
	}
}

func TestServerCloseEndsConnections(t *testing.T) {
	t.Parallel()
	a, b := pairOf(t, lab.LinkOpts{})
	s, err := lab.EchoTCP(b, netip.AddrPortFrom(addrB, 0))
	if err != nil {
		t.Fatal(err)
	}
	_, c, err := lab.AskTCP(within(t, 5*time.Second), a, netip.MustParseAddrPort("10.9.0.1:4242"), s.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("read after the server's end: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error("second close:", err)
	}
	if _, err := lab.EchoUDP(b, netip.MustParseAddrPort("0.0.0.0:7")); err == nil {
		t.Error("udp echo on the unspecified address was accepted")
	}
}
