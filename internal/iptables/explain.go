package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/policy"
)

// Packet is the first one of a connection, as rules ask about it. An ICMP packet is an echo
// request.
type Packet struct {
	Src, Dst netip.Addr
	Proto    uint8 // IP protocol number
	Device   string
}

// Verdict is what our rules in the kernel do with a packet.
type Verdict struct {
	Outcome policy.Outcome
	Match   netip.Prefix // of the rule or set that decided; invalid: none
	Address netip.Addr   // with policy.MasqNew
	Ports   string       // that netfilter chooses from, "FIRST-LAST"; empty: any
	Random  bool         // it does not try the packet's own port first
	// Unreached says that something keeps packets from our chains.
	Unreached bool
	// Draining says that the rules translate no new connection any more.
	Draining bool
}

// Explain follows our rules, as they were at the time of Inspect, and the sets as they are
// now: those of mangle, which drop, and then those of nat.
func (i *Inspector) Explain(p Packet) (v Verdict, err error) {
	f := IPv6
	if p.Src.Is4() {
		f = IPv4
	}
	nat, ok := i.nat[f]
	if !ok {
		return Verdict{Outcome: policy.PassDisabled}, nil
	}
	for _, table := range []tableState{i.mangle[f], nat} {
		w := walk{packet: p, family: f, chains: table.chains, verdict: Verdict{Unreached: i.cut[f]}}
		if err := w.follow(entryChain); err != nil {
			return Verdict{}, err
		}
		if v = w.verdict; v.Outcome.Verdict() == policy.Drop {
			break // nat does not see it
		}
	}
	if v.Draining {
		v.Outcome, v.Unreached = policy.PassDisabled, false
	}
	if v.Outcome == policy.Continue {
		return v, fmt.Errorf("chain %s: its rules give a packet no verdict", entryChain)
	}
	return v, nil
}

// walk follows the rules of one table.
type walk struct {
	packet  Packet
	family  Family
	chains  map[string][]string
	verdict Verdict
}

// follow goes through a chain. Ours go on by -g: what comes to the end of one has its verdict.
func (w *walk) follow(chain string) error {
	for _, rule := range w.chains[chain] {
		words := strings.Fields(rule)
		ok, prefix, err := w.matches(words)
		if err != nil {
			return fmt.Errorf("rule %q: %w", rule, err)
		}
		if !ok {
			continue
		}
		if next := option(words, "-g"); next != "" {
			return w.follow(next)
		}
		w.verdict.Draining = option(words, "--comment") == drainingComment
		if to := option(words, "--to-source"); to != "" {
			return w.translate(to, slices.Contains(words, "--random-fully"))
		}
		if chain == destinationChain && !prefix.IsValid() {
			prefix = netip.PrefixFrom(w.family.zero(), 0) // a set can't hold it
		}
		w.verdict.Outcome, w.verdict.Match = outcomeNamed(option(words, "--comment")), prefix
		return nil
	}
	switch chain {
	case entryChain:
		w.verdict.Outcome = policy.PassDevice
	case sourceChain:
		w.verdict.Outcome = policy.PassSource
	}
	return nil
}

// outcomeNamed is the outcome that a rule stands for by its comment.
func outcomeNamed(name string) policy.Outcome {
	for _, o := range policy.Outcomes() {
		if o.Name == name {
			return o.Outcome
		}
	}
	return policy.Continue
}

// translate reads the argument of SNAT: ADDRESS, ADDRESS:FIRST-LAST, or with [ADDRESS].
func (w *walk) translate(to string, random bool) error {
	addr, ports := to, ""
	if at := strings.LastIndex(to, ":"); w.family == IPv4 && at > 0 || strings.HasPrefix(to, "[") && at > strings.Index(to, "]") {
		addr, ports = to[:at], to[at+1:]
	}
	a, err := netip.ParseAddr(strings.Trim(addr, "[]"))
	if err != nil {
		return fmt.Errorf("--to-source %s: %w", to, err)
	}
	w.verdict.Outcome, w.verdict.Address, w.verdict.Ports, w.verdict.Random = policy.MasqNew, a, ports, random
	return nil
}

// protocolNames are those that rules have, of the protocols that can be asked about.
var protocolNames = map[string]uint8{
	"tcp": policy.ProtoTCP, "udp": policy.ProtoUDP, "udplite": policy.ProtoUDPLite, "sctp": policy.ProtoSCTP,
	"icmp": policy.ProtoICMP, "ipv6-icmp": policy.ProtoICMPv6,
}

// matches tells whether all of a rule's matches are true of the first packet of a connection,
// and by which prefix.
func (w *walk) matches(words []string) (ok bool, by netip.Prefix, err error) {
	for at := 0; at+1 < len(words); at++ {
		value := words[at+1]
		switch words[at] {
		case "-o":
			ok = value == w.packet.Device
		case "-s":
			ok, by, err = contains(value, w.packet.Src)
		case "-d":
			ok, by, err = contains(value, w.packet.Dst)
		case "-p":
			ok = protocolNames[value] == w.packet.Proto
		case "--icmp-type", "--icmpv6-type":
			ok = value == "8" && w.family == IPv4 || value == "128" && w.family == IPv6
		case "--ctstate":
			ok = slices.Contains(strings.Split(value, ","), "NEW")
		case "--match-set":
			ok, by, err = inSet(value, w.packet.Dst)
		default:
			continue // no match, or one that is true of some packets, such as a share of them
		}
		if err != nil || !ok {
			return false, by, err
		}
	}
	return true, by, nil
}

func contains(prefix string, a netip.Addr) (bool, netip.Prefix, error) {
	p, err := netip.ParsePrefix(prefix)
	if err != nil {
		one, addrErr := netip.ParseAddr(prefix)
		if addrErr != nil {
			return false, p, err
		}
		p = netip.PrefixFrom(one, one.BitLen())
	}
	return p.Contains(a), p, nil
}

// inSet finds the longest prefix of a set that holds an address.
func inSet(name string, a netip.Addr) (ok bool, longest netip.Prefix, err error) {
	set, there, err := readSet(name)
	if err == nil && !there {
		err = fmt.Errorf("set %s: gone, though a rule names it", name)
	}
	for _, p := range set.Prefixes {
		if p.Contains(a) && p.Bits() > longest.Bits() {
			ok, longest = true, p
		}
	}
	return ok, longest, err
}
