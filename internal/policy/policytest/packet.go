package policytest

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// echoID is the identifier of every ICMP echo in the table.
const echoID = 77

var protocols = map[string]uint8{
	"tcp": policy.ProtoTCP, "udp": policy.ProtoUDP, "udplite": policy.ProtoUDPLite, "sctp": policy.ProtoSCTP,
	"icmp": policy.ProtoICMP, "icmp6": policy.ProtoICMPv6,
}

var tcpFlags = map[string]uint8{
	"none": 0, "fin": policy.TCPFin, "syn": policy.TCPSyn, "rst": policy.TCPRst, "ack": policy.TCPAck,
}

var icmpTypes = map[string]uint8{
	"echo-reply": 0, "unreachable": 3, "quench": 4, "redirect": 5, "echo-request": 8, "router-solicitation": 10,
	"time-exceeded": 11, "parameter-problem": 12, "timestamp": 13, "timestamp-reply": 14,
}

var icmp6Types = map[string]uint8{
	"unreachable": 1, "too-big": 2, "time-exceeded": 3, "parameter-problem": 4, "echo-request": 128, "echo-reply": 129,
	"mld-query": 130, "mld-report": 131, "router-solicitation": 133, "router-advertisement": 134,
	"neighbor-solicitation": 135, "neighbor-advertisement": 136, "redirect": 137, "mld2-report": 143,
}

var outcomeByName = func() map[string]policy.Outcome {
	m := make(map[string]policy.Outcome)
	for _, o := range policy.Outcomes() {
		m[o.Name] = o.Outcome
	}
	return m
}()

// parseCase reads
//
//	PROTOCOL SRC > DST [FLAGS | ICMP-TYPE] [inbound] [on DEVICE] -> OUTCOME [PREFIX] [ADDRESS]
func parseCase(line string) (Case, error) {
	c := Case{Text: line, Device: "eth0"}
	left, right, _ := strings.Cut(line, " -> ")
	words := strings.Fields(left)
	if len(words) < 4 || words[2] != ">" {
		return c, fmt.Errorf("%q: want PROTOCOL SRC > DST and so on", left)
	}
	proto, ok := protocols[words[0]]
	if !ok {
		n, err := strconv.ParseUint(strings.TrimPrefix(words[0], "proto-"), 10, 8)
		if err != nil {
			return c, fmt.Errorf("protocol %q: neither a name nor proto-N", words[0])
		}
		proto = uint8(n)
	}
	c.Packet.Proto = proto
	var err error
	if c.Packet.Src, c.SrcPort, err = endpoint(words[0], words[1]); err != nil {
		return c, err
	}
	if c.Packet.Dst, c.DstPort, err = endpoint(words[0], words[3]); err != nil {
		return c, err
	}
	if c.Packet.Src.Is4() != c.Packet.Dst.Is4() {
		return c, fmt.Errorf("%s and %s are not of one family", c.Packet.Src, c.Packet.Dst)
	}
	if err := c.details(words[0], words[4:]); err != nil {
		return c, err
	}
	return c, c.want(strings.Fields(right))
}

// hasPorts tells for which protocols of the text an endpoint is ADDRESS:PORT.
func hasPorts(proto string) bool {
	switch proto {
	case "tcp", "udp", "udplite", "sctp":
		return true
	}
	return false
}

func endpoint(proto, s string) (netip.Addr, uint16, error) {
	if hasPorts(proto) {
		ap, err := netip.ParseAddrPort(s)
		return ap.Addr(), ap.Port(), err
	}
	a, err := netip.ParseAddr(s)
	return a, 0, err
}

// details reads what stands between the addresses and the arrow.
func (c *Case) details(proto string, words []string) error {
	detail := ""
	for i := 0; i < len(words); i++ {
		switch word := words[i]; {
		case word == "inbound":
			c.Packet.Inbound = true
		case word == "on" && i+1 < len(words):
			i++
			c.Device = words[i]
		case detail == "":
			detail = word
		default:
			return fmt.Errorf("one word too many: %q", word)
		}
	}
	index, ok := deviceIndex[c.Device]
	if !ok {
		return fmt.Errorf("device %q: only eth0 and eth1 exist", c.Device)
	}
	c.Packet.Device = index
	switch proto {
	case "tcp":
		for flag := range strings.SplitSeq(detail, "+") {
			bit, ok := tcpFlags[flag]
			if !ok {
				return fmt.Errorf("TCP flag %q: want none or some of fin+syn+rst+ack", flag)
			}
			c.Packet.TCPFlags |= bit
		}
	case "icmp":
		return c.icmpType(detail, icmpTypes)
	case "icmp6":
		return c.icmpType(detail, icmp6Types)
	default:
		if detail != "" {
			return fmt.Errorf("one word too many: %q", detail)
		}
	}
	return nil
}

func (c *Case) icmpType(s string, names map[string]uint8) error {
	t, ok := names[s]
	if !ok {
		n, err := strconv.ParseUint(strings.TrimPrefix(s, "type-"), 10, 8)
		if err != nil {
			return fmt.Errorf("ICMP type %q: neither a name nor type-N", s)
		}
		t = uint8(n)
	}
	c.Packet.ICMPType = t
	if strings.HasPrefix(s, "echo-") {
		c.SrcPort = echoID
	}
	return nil
}

func (c *Case) want(words []string) error {
	if len(words) == 0 {
		return fmt.Errorf("no outcome after the arrow")
	}
	o, ok := outcomeByName[words[0]]
	if !ok {
		return fmt.Errorf("unknown outcome %q", words[0])
	}
	c.Want.Outcome = o
	var err error
	for _, word := range words[1:] {
		if strings.Contains(word, "/") {
			c.Want.Match, err = netip.ParsePrefix(word)
		} else {
			c.Want.Address, err = netip.ParseAddr(word)
		}
		if err != nil {
			return err
		}
	}
	if (o == policy.MasqNew) != c.Want.Address.IsValid() {
		return fmt.Errorf("%s: an address belongs to masq-new, and only there", o)
	}
	return nil
}
