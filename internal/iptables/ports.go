package iptables

import (
	"fmt"
	"math"
	"net/netip"

	"bauta.dev/bauta/internal/policy"
)

// portRange is a run of external ports.
type portRange struct{ first, last uint16 }

func (r portRange) size() int { return int(r.last-r.first) + 1 }

// fewPorts is what a run needs to be worth a rule: the kernel looks for a free port in
// one run only, so that in a small one a connection would soon find none.
const fewPorts = 64

// portRanges are the runs of a pool; small ones are left out where the rest is most of it.
func portRanges(ports []uint16) []portRange {
	var all, large []portRange
	for i, p := range ports {
		if i > 0 && ports[i-1]+1 == p {
			all[len(all)-1].last = p
		} else {
			all = append(all, portRange{p, p})
		}
	}
	kept := 0
	for _, r := range all {
		if r.size() >= fewPorts {
			large = append(large, r)
			kept += r.size()
		}
	}
	if kept*4 >= len(ports)*3 {
		return large
	}
	return all
}

// translate is the chain that gives packets address a.
func (r *renderer) translate(a netip.Addr) []string {
	ranges := portRanges(r.in.Ports)
	var rules []string
	for _, proto := range []string{"tcp", "udp", "sctp"} {
		if len(ranges) > 1 && !r.opts.RandomFully {
			// The source port is kept in whichever run it lies.
			for _, q := range ranges {
				rules = append(rules, rule("-p "+proto, "-m multiport --sports "+q.text(":"), r.snatRule(a, q)))
			}
		}
		left := 0
		for _, q := range ranges {
			left += q.size()
		}
		for i, q := range ranges {
			share := ""
			if i < len(ranges)-1 {
				share = probability(float64(q.size()) / float64(left))
			}
			rules = append(rules, rule("-p "+proto, share, r.snatRule(a, q)))
			left -= q.size()
		}
	}
	// Protocols without ports, and UDP-Lite, for which SNAT takes no range.
	all := rule("-j SNAT --to-source "+text(a), r.random())
	if r.in.UnknownProtocols != policy.UnknownPass {
		return append(rules, all)
	}
	return append(rules, rule("-p udplite", all), rule("-p "+r.f.icmp(), all),
		rule(reason(policy.PassProtocol), "-j RETURN"))
}

func (r *renderer) snatRule(a netip.Addr, q portRange) string {
	to := text(a)
	if a.Is6() {
		to = "[" + to + "]"
	}
	return rule(fmt.Sprintf("-j SNAT --to-source %s:%s", to, q.text("-")), r.random())
}

func (r *renderer) random() string {
	if r.opts.RandomFully {
		return "--random-fully"
	}
	return ""
}

func (r portRange) text(dash string) string {
	if r.first == r.last {
		return fmt.Sprint(r.first)
	}
	return fmt.Sprintf("%d%s%d", r.first, dash, r.last)
}

// probability is a share as the kernel holds it, in steps of 2^-31, and lists it.
func probability(p float64) string {
	const steps = 1 << 31
	return fmt.Sprintf("-m statistic --mode random --probability %.11f", math.Round(p*steps)/steps)
}
