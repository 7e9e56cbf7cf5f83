package iptables

import (
	"net/netip"
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
	"bauta.dev/bauta/internal/policy/policytest"
)

// Random policies and packets: what leaves is what policy.Decide says. Packets of the kinds
// in differences are left out.
func TestRandomParity(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		r := labtest.Rand(t)
		w := newWire(t, o)
		for _, plain := range []bool{false, true} {
			w.tables.probed, w.tables.plain = true, plain
			asked := 0
			for range 12 {
				in := policytest.RandomInput(r)
				// The packet that tells the end of others must leave.
				in.HostAddrs = append(in.HostAddrs, netip.MustParseAddr("203.0.113.250"))
				p, err := policy.Build(in)
				if err != nil {
					t.Fatal(err)
				}
				w.apply(p)
				for range 30 {
					c := policytest.RandomCase(r)
					c.Packet.Inbound = false
					if pkt := casePacket(c); !sameToNetfilter(c.Packet) || !forwardable(pkt) || c.SrcPort == 0 && pkt.HasPorts() {
						continue
					}
					asked++
					w.forget()
					c.Want = p.Decide(c.Packet)
					c.Text = c.Packet.Src.String() + " > " + c.Packet.Dst.String()
					if err := compare(c, w.verdict(c)); err != nil {
						t.Errorf("protocol %d flags %#x type %d on %s: want %s %s: %v", c.Packet.Proto, c.Packet.TCPFlags, c.Packet.ICMPType, c.Device, c.Want.Outcome, c.Want.Address, err)
						t.Logf("%+v", in)
					}
				}
			}
			t.Logf("plain %v: %d packets", plain, asked)
			if asked < 50 {
				t.Errorf("only %d packets", asked)
			}
		}
	})
}

// verdict is decide without a look at the bytes: pools are small here.
func (w *wire) verdict(c policytest.Case) []packetOut {
	out := w.decide(c)
	for i := range out {
		out[i].err = nil
	}
	return out
}

// sameToNetfilter tells whether netfilter sees such a packet as the policy does.
func sameToNetfilter(p policy.Packet) bool {
	switch p.Proto {
	case packet.TCP:
		return slices.Contains([]uint8{policy.TCPSyn, policy.TCPAck, policy.TCPRst, policy.TCPFin | policy.TCPAck, policy.TCPSyn | policy.TCPAck}, p.TCPFlags)
	case packet.UDPLite:
		return false
	case packet.ICMP:
		return p.Src.Is4()
	case packet.ICMPv6:
		return p.Src.Is6()
	}
	return true
}
