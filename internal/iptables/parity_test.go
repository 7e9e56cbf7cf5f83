package iptables

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// Why netfilter does otherwise than the policy says.
const (
	udpliteSum  = "conntrack sums UDP-Lite with the protocol number of UDP, so that every right datagram is INVALID to it"
	familyOff   = "a family that is off has no rules"
	wrongFamily = "ICMP of the other family is INVALID to conntrack: dropped, not leaked"
	flags       = "such TCP is INVALID to conntrack: dropped, not leaked"
	reopened    = "nat is asked for the first packet of a connection only, in either direction"
	loopback    = "no packet: the kernel forwards none to 127.0.0.0/8"
)

// differences are the cases in which netfilter can't do what the policy says, each with
// the reason. docs/modes.md lists them for users.
var differences = map[string]string{
	"udplite 10.0.1.2:40000 > 1.1.1.1:53 -> masq-new 192.0.2.1":                        udpliteSum,
	"udplite [fd00:10::2]:40000 > [2606:4700::1]:53 -> masq-new 2001:db8:2::1":         udpliteSum,
	"udplite 10.0.1.2:53 > 1.1.1.1:40000 inbound -> pass-inbound":                      udpliteSum,
	"tcp [fd00:10::2]:40000 > [::ffff:10.9.9.9]:80 syn -> drop-bad-header":             familyOff,
	"proto-58 10.0.1.2 > 1.1.1.1 -> masq-new 192.0.2.1":                                wrongFamily,
	"proto-1 fd00:10::2 > 2606:4700::1 -> masq-new 2001:db8:2::1":                      wrongFamily,
	"tcp 10.0.1.2:80 > 1.1.1.1:40000 none inbound -> pass-inbound":                     flags,
	"tcp 10.0.1.2:80 > 1.1.1.1:40000 syn+fin inbound -> pass-inbound":                  flags,
	"tcp 10.0.1.2:40000 > 1.1.1.1:80 none -> masq-new 192.0.2.1":                       flags,
	"tcp 10.0.1.2:80 > 1.1.1.1:40000 syn inbound -> masq-new 192.0.2.1":                reopened,
	"tcp [fd00:10::2]:80 > [2606:4700::1]:40000 syn inbound -> masq-new 2001:db8:2::1": reopened,
	"tcp 10.0.1.2:40000 > 127.255.255.255:80 syn -> pass-native 64.0.0.0/2":            loopback,
}

// differs tells whether the case is a difference under this input.
func differs(in policy.Input, c policytest.Case) (reason string, ok bool) {
	reason, ok = differences[c.Text]
	if reason == familyOff {
		ok = !in.IPv6
	}
	return reason, ok
}

// Every case of the table that all renderings of a policy share: the packet is sent
// through the node, and what leaves says the verdict.
func TestParity(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		groups, err := policytest.Load()
		if err != nil {
			t.Fatal(err)
		}
		w := newWire(t, o)
		start, cases := time.Now(), 0
		seen := make(map[string]bool)
		for _, g := range groups {
			p, err := policy.Build(g.Input)
			if err != nil {
				t.Fatal(err)
			}
			w.apply(p)
			for _, c := range g.Cases {
				cases++
				w.forget()
				err := compare(c, w.decide(c))
				reason, known := differs(g.Input, c)
				seen[c.Text] = true
				switch {
				case err != nil && !known:
					t.Errorf("%s: %v", g.Name, err)
				case err == nil && known:
					t.Errorf("%s: cases.txt:%d: %s: as it should be: no difference any more (%s)", g.Name, c.Line, c.Text, reason)
				}
			}
		}
		for text := range differences {
			if !seen[text] {
				t.Errorf("a difference that is no case: %s", text)
			}
		}
		t.Logf("%d groups, %d cases, %d differences, %s", len(groups), cases, len(differences), time.Since(start).Round(time.Millisecond))
	})
}

// The page for users has every reason.
func TestDifferencesArePublished(t *testing.T) {
	page, err := os.ReadFile("../../docs/modes.md")
	if err != nil {
		t.Fatal(err)
	}
	for text, why := range differences {
		if why != loopback && !strings.Contains(string(page), " | "+why+" | ") {
			t.Errorf("docs/modes.md does not give the reason of %s: %s", text, why)
		}
	}
}

// compare holds the verdict and the address against the table: netfilter gives no reasons.
func compare(c policytest.Case, got []packetOut) error {
	verdict, address := policy.Drop, netip.Addr{}
	if len(got) > 1 {
		return fmt.Errorf("cases.txt:%d: %s: %d packets left", c.Line, c.Text, len(got))
	}
	if len(got) == 1 {
		if got[0].err != nil {
			return fmt.Errorf("cases.txt:%d: %s: %w", c.Line, c.Text, got[0].err)
		}
		verdict = policy.Pass
		if got[0].src != c.Packet.Src {
			verdict, address = policy.Masquerade, got[0].src
		}
	}
	if want := c.Want.Outcome.Verdict(); verdict != want || address != c.Want.Address {
		return fmt.Errorf("cases.txt:%d: %s: got %s %s", c.Line, c.Text, verdict, address)
	}
	return nil
}

type packetOut struct {
	src netip.Addr
	err error // what is wrong with it besides
}

// decide sends the packet of a case and returns what left.
func (w *wire) decide(c policytest.Case) []packetOut {
	w.t.Helper()
	p := casePacket(c)
	in := map[string]string{"eth0": "in0", "eth1": "in1"}[c.Device]
	if c.Packet.Inbound {
		w.open(c.Device, in, p)
		if p.Proto == packet.TCP {
			p.Seq, p.Ack = serverSeq, clientSeq+1
			if p.Flags&packet.SYN == 0 {
				p.Seq++
			}
		}
		w.left(c.Device)
		w.left("in0")
	}
	forwarded := forwardable(p)
	if forwarded {
		w.arrive(in, p)
		p.Hops = 63
	} else {
		w.send(c.Device, p)
	}
	var out []packetOut
	for _, b := range w.left(c.Device) {
		f, ok := lab.ParseIP(b)
		if !ok {
			w.t.Fatalf("%s: not a packet: %x", c.Text, b)
		}
		if f.Dst != p.Dst || f.Proto != p.Proto {
			continue // the node answers a multicast echo request
		}
		got := packetOut{src: f.Src, err: packet.Check(packet.Raw, b)}
		if got.err == nil && forwarded {
			want := p
			want.Link = packet.Raw
			if f.Src != p.Src {
				want = want.From(f.Src, externalPort(p, f))
			}
			if string(b) != string(want.Build()) {
				got.err = fmt.Errorf("left as %x, want %x", b, want.Build())
			}
		}
		out = append(out, got)
	}
	return out
}

// externalPort is p's own port, if that is one of the pool, else whichever the packet has.
func externalPort(p packet.Packet, f lab.Frame) uint16 {
	if !p.HasPorts() || p.Proto == packet.UDPLite || p.SrcPort >= 32768 {
		return p.Port()
	}
	return max(32768, binary.BigEndian.Uint16(f.L4))
}

// Sequence numbers of a connection from outside: netfilter looks at them.
const (
	clientSeq = 1000
	serverSeq = 5000
)

// open opens the connection from outside that p belongs to. A TCP connection of which p
// is not the second packet is open on both sides.
func (w *wire) open(dev, in string, p packet.Packet) {
	w.t.Helper()
	first := opener(p)
	if p.Proto == packet.TCP {
		first.Seq = clientSeq
	}
	w.arrive(dev, first)
	if p.Proto != packet.TCP || p.Flags&packet.SYN != 0 {
		return
	}
	answer := first.Reply()
	answer.Flags, answer.Seq, answer.Ack = packet.SYN|packet.ACK, serverSeq, clientSeq+1
	w.arrive(in, answer)
	third := first
	third.Flags, third.Seq, third.Ack = packet.ACK, clientSeq+1, serverSeq+1
	w.arrive(dev, third)
}

// forwardable tells whether a router forwards such a packet. The node itself can send
// the others, with any source.
func forwardable(p packet.Packet) bool {
	for _, a := range []netip.Addr{p.Src, p.Dst} {
		if a.IsMulticast() || a.IsLinkLocalUnicast() || a.IsUnspecified() || a.Is4In6() ||
			a.Is4() && (a.As4()[0] == 0 || a.As4() == [4]byte{255, 255, 255, 255} || a.As4()[0] == 0xfe) ||
			a.Is6() && a.As16()[0] == 0xfe && a.As16()[1]&0x80 != 0 {
			return a.Is4() && a.IsLinkLocalUnicast()
		}
	}
	return true
}

// casePacket builds the packet of a case, such as its protocol sends it first.
func casePacket(c policytest.Case) packet.Packet {
	p := packet.Packet{
		Src: c.Packet.Src, Dst: c.Packet.Dst, Proto: c.Packet.Proto,
		SrcPort: c.SrcPort, DstPort: c.DstPort, Ident: c.SrcPort,
		Flags: c.Packet.TCPFlags, Type: c.Packet.ICMPType, Payload: make([]byte, 20),
	}
	if p.Proto == packet.SCTP {
		p.Type = packet.SCTPInit
		p.Payload[0] = 1 // the tag
		if c.Packet.Inbound {
			p.Type, p.Seq = packet.SCTPInitAck, 0x01000000
		}
	}
	if isICMPError(p) {
		p.Payload = quoted(p).Build()
	}
	return p
}

// What is INVALID to conntrack by the checksum that it computes is masqueraded where it
// does not compute one: it is no matter of our rules.
func TestUDPLiteWithoutChecksums(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		groups, err := policytest.Load()
		if err != nil {
			t.Fatal(err)
		}
		w := newWire(t, o)
		if err := w.ns.Sysctl("net.netfilter.nf_conntrack_checksum", "0"); err != nil {
			t.Fatal(err)
		}
		for _, g := range groups {
			for _, c := range g.Cases {
				if differences[c.Text] != udpliteSum {
					continue
				}
				p, err := policy.Build(g.Input)
				if err != nil {
					t.Fatal(err)
				}
				w.apply(p)
				w.forget()
				if err := compare(c, w.decide(c)); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// quoted is the datagram that the ICMP error p is about: its sender got it.
func quoted(p packet.Packet) packet.Packet {
	return packet.Packet{Link: packet.Raw, Src: p.Dst, Dst: p.Src, Proto: packet.UDP, SrcPort: 40000, DstPort: 53,
		Payload: []byte("what the error is about")}
}

func isICMPError(p packet.Packet) bool {
	switch {
	case p.Proto == packet.ICMP && p.Src.Is4():
		return p.Type == 3 || p.Type == 4 || p.Type == 5 || p.Type == 11 || p.Type == 12
	case p.Proto == packet.ICMPv6 && p.Src.Is6():
		return p.Type < 128
	}
	return false
}

// opener is the packet from outside that begins what p belongs to.
func opener(p packet.Packet) packet.Packet {
	open := p.Reply()
	switch {
	case isICMPError(p):
		return quoted(p)
	case p.Proto == packet.TCP:
		open.Flags = packet.SYN
	case p.Proto == packet.SCTP:
		open.Type, open.Seq = packet.SCTPInit, 0
	case p.IsQuery():
		open.Type = map[uint8]uint8{0: 8, 8: 8, 14: 13, 13: 13, 129: 128, 128: 128}[p.Type]
	}
	return open
}
