package iptables

import (
	"context"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

var listed = func(in *policy.Input) {
	in.NonMasq = rules("172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
	in.Nodes = []policy.NodeAddr{{Addr: netip.MustParseAddr("192.0.2.3"), Node: "b", Type: policy.InternalIP}}
}

// exchange are commands that put a set made by ipset in the place of ours.
func exchange(name, family string, entries ...string) [][]string {
	cmds := [][]string{strings.Fields("ipset create other hash:net family " + family)}
	for _, e := range entries {
		cmds = append(cmds, strings.Fields("ipset add other "+e))
	}
	return append(cmds, []string{"ipset", "swap", "other", name}, []string{"ipset", "destroy", "other"})
}

// What others do to our rules is noticed, and healed.
func TestCheckNoticesAndApplyHeals(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		p := build(t, listed)
		n.apply(p)
		n.right()
		ipt, ip6t := n.ipt(IPv4, ""), n.ipt(IPv6, "")
		for _, c := range []struct {
			name, want string
			damage     [][]string
		}{
			{"flush of nat", "IPv4: table nat: chain BAUTA-POSTROUTING was changed", [][]string{{ipt, "-t", "nat", "-F"}}},
			{"flush of the hook", "IPv6: table mangle: POSTROUTING does not lead to BAUTA-POSTROUTING", [][]string{{ip6t, "-t", "mangle", "-F", "POSTROUTING"}}},
			{"chains removed", "IPv4: table nat: chain BAUTA-POSTROUTING is gone", [][]string{{ipt, "-t", "nat", "-F"}, {ipt, "-t", "nat", "-X"}}},
			{"a rule before ours", "IPv4: table nat: a rule stands before ours in POSTROUTING",
				[][]string{{ipt, "-t", "nat", "-I", "POSTROUTING", "-s", "10.9.0.0/16", "-j", "MASQUERADE"}}},
			{"a second jump", "IPv4: table nat: another rule leads to our chains", [][]string{{ipt, "-t", "nat", "-A", "POSTROUTING", "-s", "10.9.0.0/16", "-j", "BAUTA-SOURCE"}}},
			{"a rule deleted", "IPv4: table nat: chain BAUTA-SOURCE was changed", [][]string{{ipt, "-t", "nat", "-D", "BAUTA-SOURCE", "1"}}},
			{"a rule added", "IPv6: table nat: chain BAUTA-DESTINATION was changed", [][]string{{ip6t, "-t", "nat", "-I", "BAUTA-DESTINATION", "-j", "RETURN"}}},
			{"a rule replaced", "IPv4: table nat: chain BAUTA-SNAT-1 was changed",
				[][]string{{ipt, "-t", "nat", "-R", "BAUTA-SNAT-1", "1", "-p", "tcp", "-j", "SNAT", "--to-source", "192.0.2.1:1-2"}}},
			{"a chain added", "IPv4: table nat: chain BAUTA-SNAT-9 was added", [][]string{{ipt, "-t", "nat", "-N", "BAUTA-SNAT-9"}}},
			{"a set emptied", "IPv4: set bauta-nonmasq-4 was changed", [][]string{{"ipset", "flush", "bauta-nonmasq-4"}}},
			{"an entry exchanged", "IPv6: set bauta-nonmasq-6 was changed",
				[][]string{{"ipset", "del", "bauta-nonmasq-6", "fc00::/7"}, {"ipset", "add", "bauta-nonmasq-6", "fc00::/8"}}},
			// ipset adds such entries only to sets that it made itself.
			{"an entry that does not match", "IPv4: set bauta-nonmasq-4 was changed",
				exchange("bauta-nonmasq-4", "inet", "172.16.0.0/12 nomatch", "192.168.0.0/16")},
			{"an entry that excepts a part", "IPv6: set bauta-nonmasq-6 was changed", exchange("bauta-nonmasq-6", "inet6", "fc00::/7", "fd12::/16 nomatch")},
			{"entries that end", "IPv4: set bauta-nonmasq-4 was changed",
				exchange("bauta-nonmasq-4", "inet timeout 600", "172.16.0.0/12", "192.168.0.0/16")},
			{"everything gone", "IPv4: table mangle: chain BAUTA-POSTROUTING is gone", [][]string{
				{ipt, "-t", "mangle", "-F"}, {ipt, "-t", "mangle", "-X"}, {ipt, "-t", "nat", "-F"}, {ipt, "-t", "nat", "-X"},
				{"ipset", "destroy", "bauta-nonmasq-4"}, {"ipset", "destroy", "bauta-nodes-4"}}},
		} {
			for _, cmd := range c.damage {
				n.run(cmd[0], cmd[1:]...)
			}
			if got := n.check(); got != c.want {
				t.Errorf("%s: check says %q, want %q", c.name, got, c.want)
			}
			if held(n, p) {
				t.Errorf("%s: a new process finds all right", c.name)
			}
			n.apply(p)
			if got := n.tables.Changed(); got != c.want {
				t.Errorf("%s: apply found %q changed, want %q", c.name, got, c.want)
			}
			if got := n.check(); got != "" {
				t.Errorf("%s: not healed: %s", c.name, got)
			}
			if !held(n, p) {
				t.Errorf("%s: healed, but not for a new process", c.name)
			}
			if strings.Contains(c.name, "before ours") {
				// It is still there, behind ours.
				const order = "-A POSTROUTING -j BAUTA-POSTROUTING\n-A POSTROUTING -s 10.9.0.0/16 -j MASQUERADE\n"
				if out := n.run(n.ipt(IPv4, "-save"), "-t", "nat"); !strings.Contains(out, order) {
					t.Errorf("the rule of another was touched:\n%s", out)
				}
			}
		}
	})
}

// Rules that are right keep their counters, whatever is written beside them.
func TestApplyLeavesAloneWhatIsRight(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		w := newWire(t, o)
		p := build(t, listed)
		w.apply(p)
		w.arrive("in0", packet.Packet{Src: netip.MustParseAddr("10.0.1.2"), Dst: netip.MustParseAddr("198.51.100.1"), Proto: packet.TCP, SrcPort: 40000, DstPort: 80, Flags: packet.SYN})
		if n := len(w.left("eth0")); n != 1 {
			t.Fatalf("%d packets left", n)
		}
		counted := regexp.MustCompile(`(?m)^\[1:40\] -A BAUTA-SNAT-1 -p tcp `)
		guarded := regexp.MustCompile(`(?m)^\[[1-9]\d*:\d+\] -A BAUTA-SOURCE -s 10.0.1.0/24 `)
		look := func(when string) {
			t.Helper()
			if out := w.counters(IPv4, "nat"); !counted.MatchString(out) {
				t.Errorf("%s: nat was written:\n%s", when, out)
			}
			if out := w.counters(IPv4, "mangle"); !guarded.MatchString(out) {
				t.Errorf("%s: mangle was written:\n%s", when, out)
			}
		}
		look("at first")
		w.apply(p)
		look("the same again")
		// A new agent finds what the last one wrote.
		again := tables(t, w.ns, o)
		again.apply(p)
		look("by a new agent")
		// Another list: the set only.
		w.apply(build(t, func(in *policy.Input) {
			listed(in)
			in.NonMasq = rules("172.16.0.0/12", "fc00::/8")
		}))
		look("another list")
		if out := w.run("ipset", "list", "bauta-nonmasq-4"); strings.Contains(out, "192.168.0.0/16") || !strings.Contains(out, "172.16.0.0/12") {
			t.Errorf("the set is\n%s", out)
		}
		// A chain that is edited: that chain only.
		w.run(w.ipt(IPv4, ""), "-t", "nat", "-F", "BAUTA-DESTINATION")
		w.apply(build(t, listed))
		look("another chain")
		w.right()
	})
}

// A set that is not needed any more goes, one that is needed comes, and no set is left aside.
func TestSetsComeAndGo(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		want := func(names string) {
			t.Helper()
			n.right()
			got := strings.Join(slices.Sorted(slices.Values(strings.Fields(n.run("ipset", "list", "-n")))), " ")
			if got != names {
				t.Errorf("sets %q, want %q", got, names)
			}
		}
		n.apply(build(t, listed))
		want("bauta-nodes-4 bauta-nonmasq-4 bauta-nonmasq-6")
		n.apply(build(t, nil))
		want("")
		n.apply(build(t, func(in *policy.Input) { in.Native = rules("0.0.0.0/0", "fd00::/8") }))
		want("bauta-native-6")
		n.apply(build(t, func(in *policy.Input) {
			in.Native = rules("10.0.0.0/8", "fd00::/8")
			in.IPv6 = false
		}))
		want("bauta-native-4")
	})
}

// held is what a new process says of the rules in the kernel.
func held(n *inNS, p *policy.Policy) (is bool) {
	n.t.Helper()
	again := tables(n.t, n.ns, n.o)
	n.do(func() (err error) { is, err = again.tables.Held(context.Background(), p); return err })
	return is
}

// Another policy is no change by others.
func TestAnotherPolicyIsNoChange(t *testing.T) {
	eachBackend(t, func(t *testing.T, o Options) {
		n := tables(t, labtest.NewNS(t), o)
		if held(n, build(t, listed)) {
			t.Error("rules are held before there are any")
		}
		for _, p := range []*policy.Policy{build(t, listed), build(t, nil), build(t, listed)} {
			if n.apply(p); n.tables.Changed() != "" {
				t.Errorf("changed by others: %s", n.tables.Changed())
			}
		}
	})
}
