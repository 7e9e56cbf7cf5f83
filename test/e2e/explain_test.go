package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// ask is what the command says of a packet as JSON.
func (n *node) ask(args ...string) (e agent.Explanation) {
	n.t.Helper()
	n.cliJSON(&e, append([]string{"explain"}, args...)...)
	return e
}

// explain asks about a packet, and checks that what is said of it is in the text for people too.
func (n *node) explain(args ...string) agent.Explanation {
	n.t.Helper()
	e := n.ask(args...)
	text := n.cli(append([]string{"explain"}, args...)...)
	for _, want := range append([]string{e.Verdict + ": ", e.Reason, e.Match, e.Source, e.Device, e.Address}, e.Notes...) {
		if !strings.Contains(text, want) {
			n.t.Errorf("explain %s: %q is missing in\n%s", strings.Join(args, " "), want, text)
		}
	}
	return e
}

// about is ask for a packet between two addresses, without ports.
func (n *node) about(src, dst netip.Addr, args ...string) agent.Explanation {
	n.t.Helper()
	return n.ask(append([]string{"--src=" + src.String(), "--dst=" + dst.String()}, args...)...)
}

// wantExplained compares an explanation without its notes; the port of iptables mode is chosen by netfilter.
func (n *node) wantExplained(got, want agent.Explanation) {
	n.t.Helper()
	if n.backend != "" && want.Reason == "masq-new" {
		want.Port = 0
	}
	got.Notes = nil
	if !reflect.DeepEqual(got, want) {
		n.t.Errorf("explained as %+v\nwant %+v", got, want)
	}
}

func (n *node) wantNote(e agent.Explanation, texts ...string) {
	n.t.Helper()
	for _, text := range texts {
		if !strings.Contains(strings.Join(e.Notes, "\n"), text) {
			n.t.Errorf("%q is missing in the notes of %+v", text, e)
		}
	}
}

// Each line of the decision, by option and by file, with the agent and without; and asking changes nothing.
func TestExplain(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{Pods: 2})
	list := n.writeList("198.51.100.0/24", "2001:db8:99::/64")
	nodes := n.write("nodes", "192.0.2.77 node7\n2001:db8:2::77 node7\n")
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list, "--nodes-file="+nodes,
		"--ipv4-native-routing-cidr=10.0.0.0/16", "--ipv6-native-routing-cidr=fd00::/16")
	check := func(when string) {
		t.Helper()
		for _, world := range n.WorldAddr.All() {
			pod, pod2, own, bridge := n.PodAddrs[0].Of(world), n.PodAddrs[1].Of(world), n.NodeAddr.Of(world), n.PodGateway.Of(world)
			pods := lab.PodRange4
			excluded, native, other := "198.51.100.0/24", "10.0.0.0/16", "192.0.2.77/32"
			nativeOption, outside := "option ipv4-native-routing-cidr", netip.MustParseAddr("10.0.9.9")
			multicast, all := netip.MustParseAddr("239.1.1.1"), "224.0.0.0/4"
			foreign := netip.MustParseAddr("172.31.0.9")
			if world.Is6() {
				pods = lab.PodRange6
				excluded, native, other = "2001:db8:99::/64", "fd00::/16", "2001:db8:2::77/128"
				nativeOption, outside = "option ipv6-native-routing-cidr", netip.MustParseAddr("fd00:9::9")
				multicast, all = netip.MustParseAddr("ff0e::1"), "ff00::/8"
				foreign = netip.MustParseAddr("2001:db8:7777::9")
			}
			masq := agent.Explanation{Verdict: "masquerade", Reason: "masq-new", Match: pods.String(), Source: "option pod-cidrs", Device: "eth0", Address: own.String(), Port: 50000}
			for _, proto := range []string{"tcp", "udp", "icmp"} {
				n.wantExplained(n.about(pod, world, "--proto="+proto), masq)
			}
			n.wantExplained(n.explain("--src="+netip.AddrPortFrom(pod, 41000).String(), "--dst="+netip.AddrPortFrom(world, 80).String()), func() agent.Explanation { e := masq; e.Port = 41000; return e }())
			pass := func(reason, match, source, device string) agent.Explanation {
				return agent.Explanation{Verdict: "pass", Reason: reason, Match: match, Source: source, Device: device}
			}
			n.wantExplained(n.about(pod, n.Excluded.Of(world)), pass("pass-nonmasq", excluded, "file "+list, "eth0"))
			n.wantExplained(n.about(pod, outside, "--device=eth0"), pass("pass-native", native, nativeOption, "eth0"))
			n.wantExplained(n.about(pod, netip.MustParsePrefix(other).Addr()), pass("pass-node", other, "file "+nodes, "eth0"))
			n.wantExplained(n.about(pod, multicast, "--device=eth0", "--proto=udp"), pass("pass-multicast", all, "default", "eth0"))
			n.wantExplained(n.about(foreign, world), pass("pass-source", "", "option pod-cidrs", "eth0"))
			n.wantExplained(n.about(own, world), pass("pass-host", netip.PrefixFrom(own, own.BitLen()).String(), "", "eth0"))
			// What stays on the node: to its addresses and to pods.
			toNode := n.about(pod, own)
			n.wantExplained(toNode, pass("pass-device", "", "option devices", "lo"))
			n.wantNote(toNode, "address of this node", "no masquerade device; those are: eth0")
			if e := n.about(pod, bridge); e.Verdict != "pass" || e.Device != "lo" {
				t.Errorf("%s: to the gateway: %+v", when, e)
			}
			if e := n.about(pod, pod2); e.Reason != "pass-device" || e.Device == "eth0" {
				t.Errorf("%s: to another pod: %+v", when, e)
			}
		}
	}
	check("running")
	if list := n.natList("--all"); len(list) != 0 {
		t.Errorf("asking has made %+v", list)
	}
	n.inBPF(func() {
		if c := n.counts(); c["masq-new"]+c["pass-nonmasq"]+c["pass-native"] != 0 {
			t.Errorf("asking was counted: %v", c)
		}
	})
	n.kill()
	check("agent down")
}

// A known connection is told with its mapping, and a port that is taken is not offered.
func TestExplainKnown(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{Pods: 2})
	for _, world := range n.WorldAddr.All() {
		server := server(t, lab.EchoTCP, n.World, netip.AddrPortFrom(world, 8080))
		conn, seen := n.talk(0, server, 40001)
		pods := lab.PodRange4
		if world.Is6() {
			pods = lab.PodRange6
		}
		of := func(pod int, port uint16) []string {
			return []string{"--src=" + netip.AddrPortFrom(n.PodAddrs[pod].Of(world), port).String(), "--dst=" + server.String()}
		}
		n.wantExplained(n.explain(of(0, 40001)...), agent.Explanation{Verdict: "masquerade", Reason: "masq-known", Match: pods.String(),
			Source: "option pod-cidrs", Device: "eth0", Address: seen.Addr().String(), Port: seen.Port()})
		e := n.explain(of(1, 40001)...)
		if e.Reason != "masq-new" || n.backend == "" && (e.Port == seen.Port() || e.Port == 0) {
			t.Errorf("of another pod: %+v", e)
		}
		n.inBPF(func() {
			// The port that was told is the one that it gets.
			_, got := n.talk(1, server, 40001)
			if got.Port() != e.Port {
				t.Errorf("told port %d, got %d", e.Port, got.Port())
			}
		})
		if n.backend != "" {
			n.wantNote(e, "netfilter chooses the port when the packet comes", "of 32768-65535")
		}
		if !answers(conn) {
			t.Error("the connection does not go on")
		}
	}
}

// A connection opened from outside, in each mode as docs/modes.md says: netfilter takes a pod's SYN on its ports
// for a packet of it, the programs take it for a connection of its own.
func TestExplainInbound(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{WorldKnowsPods: true})
	for _, client := range n.Excluded.All() {
		in := openInbound(t, n, client)
		in.check(t, "opened")
		tcp := in.tcp.LocalAddr().String()
		udp := in.udp.LocalAddr().String()
		e := n.explain("--src="+netip.AddrPortFrom(in.pod, 8080).String(), "--dst="+tcp)
		if n.backend == "" {
			if e.Reason != "masq-new" {
				t.Errorf("SYN: %+v", e)
			}
			n.wantNote(e, "opened from outside", "pass-inbound")
		} else {
			if e.Verdict != "pass" || e.Reason != "pass-inbound" {
				t.Errorf("SYN: %+v", e)
			}
			n.wantNote(e, "belongs to it")
		}
		if e := n.explain("--proto=udp", "--src="+in.udpServer.String(), "--dst="+udp); e.Verdict != "pass" || e.Reason != "pass-inbound" {
			t.Errorf("UDP: %+v", e)
		}
	}
}

// What left untranslated counts as new when its exclusion is gone, but netfilter keeps to what its
// rules said first (docs/modes.md).
func TestExplainExclusionRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{WorldKnowsPods: true})
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+n.writeList("198.51.100.0/24"))
	server := server(t, lab.EchoTCP, n.World, netip.AddrPortFrom(n.Excluded.V4, 8080))
	conn, seen := n.talk(0, server, 40001)
	if seen.Addr() != n.PodAddrs[0].V4 {
		t.Fatalf("excluded: seen as %s", seen)
	}
	args := []string{"--src=" + seen.String(), "--dst=" + server.String()}
	if e := n.explain(args...); e.Reason != "pass-nonmasq" {
		t.Errorf("excluded: %+v", e)
	}
	n.writeList("10.99.0.0/16")
	labtest.Eventually(t, patience, func() error {
		if got := n.cli("bpf", "ipmasq", "list"); !strings.Contains(got, "10.99.0.0/16") {
			return fmt.Errorf("bpf ipmasq list: %s", got)
		}
		return nil
	})
	n.awaitPolicyFile("10.99.0.0/16")
	e := n.explain(args...)
	if n.backend == "" {
		if e.Reason != "masq-new" {
			t.Errorf("exclusion removed: %+v", e)
		}
		return
	}
	if e.Verdict != "pass" || e.Reason != "" {
		t.Errorf("exclusion removed: %+v", e)
	}
	n.wantNote(e, "asks its rules for the first packet only", "masq-new")
	if !answers(conn) {
		t.Error("the connection does not go on")
	}
}

// The address of a route's source, and what is dropped for want of any.
func TestExplainAddress(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	source, towards := netip.MustParseAddr("198.51.100.50"), netip.MustParsePrefix("203.0.113.0/24")
	must(t, n.Node.AddAddr("lo", netip.PrefixFrom(source, 32)))
	must(t, n.Node.AddRoute(lab.Route{Dst: towards, Via: n.WorldAddr.V4, Dev: "eth0", Src: source}))
	n.start(podCIDRs, "--enable-masquerade-to-route-source")
	pod := n.PodAddrs[0].V4
	for dst, want := range map[netip.Addr]netip.Addr{netip.MustParseAddr("203.0.113.5"): source, n.WorldAddr.V4: n.NodeAddr.V4} {
		if e := n.about(pod, dst); e.Reason != "masq-new" || e.Address != want.String() {
			t.Errorf("to %s: %+v, want %s", dst, e, want)
		}
	}
	// Both families lose what they could have: eBPF and rules drop, and say so.
	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V6, 64)))
	must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute6, Dev: "eth0"}))
	labtest.Eventually(t, 10*time.Second, func() error {
		e := n.ask("--src="+n.PodAddrs[0].V6.String(), "--dst="+n.WorldAddr.V6.String())
		if e.Verdict != "drop" || e.Reason != "drop-no-address" || e.Address != "" || e.Port != 0 {
			return fmt.Errorf("without an address: %+v", e)
		}
		return nil
	})
}

// awaitPolicyFile waits until policy.json has a text: it is written after the kernel's part.
func (n *node) awaitPolicyFile(text string) {
	n.t.Helper()
	labtest.Eventually(n.t, patience, func() error {
		got, err := os.ReadFile(filepath.Join(n.runDir, "policy.json"))
		if err == nil && !strings.Contains(string(got), text) {
			err = fmt.Errorf("policy.json: no %s", text)
		}
		return err
	})
}

// changePolicyFile edits policy.json; what is empty then goes.
func (n *node) changePolicyFile(edit func(string) string) {
	n.t.Helper()
	path := filepath.Join(n.runDir, "policy.json")
	text, err := os.ReadFile(path)
	must(n.t, err)
	if edited := edit(string(text)); edited != "" {
		must(n.t, os.WriteFile(path, []byte(edited), 0o600))
		return
	}
	must(n.t, os.Remove(path))
}

// wantDraining checks that a connection that drains is told with the mapping that it has, and another
// one as new.
func (n *node) wantDraining(pod int, port uint16, server netip.AddrPort, mode string, external uint16) {
	n.t.Helper()
	about := func(port uint16) agent.Explanation {
		return n.explain("--src="+netip.AddrPortFrom(n.PodAddrs[pod].Of(server.Addr()), port).String(), "--dst="+server.String())
	}
	e := about(port)
	if e.Reason != "masq-known" || e.Address != n.NodeAddr.Of(server.Addr()).String() || e.Port != external {
		n.t.Errorf("a connection that drains: %+v", e)
	}
	n.wantNote(e, "one of the connections of "+mode+" mode, which drain")
	if e := about(port + 1); e.Reason != "masq-new" {
		n.t.Errorf("another connection: %+v", e)
	}
}

// What a policy of IPsec would encrypt: netfilter translates it before, the programs never see it (docs/modes.md).
func TestExplainIPsec(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	_, err := n.Node.Run(within(t, patience), labtest.Tool(t, "ip"), "xfrm", "policy", "add", "src", lab.PodRange4.String(), "dst", "198.18.7.0/24", "dir", "out",
		"tmpl", "src", n.NodeAddr.V4.String(), "dst", n.WorldAddr.V4.String(), "proto", "esp", "mode", "tunnel")
	must(t, err)
	e := n.explain("--src="+n.PodAddrs[0].V4.String(), "--dst=198.18.7.7", "--device=eth0")
	n.wantNote(e, "a policy of IPsec (xfrm) is for this packet")
	n.inBPF(func() { n.wantNote(e, "before the programs see it") })
	if n.backend != "" {
		n.wantNote(e, "it is translated before")
	}
	if e := n.about(n.PodAddrs[0].V4, n.WorldAddr.V4); len(e.Notes) > 0 && strings.Contains(e.Notes[0], "IPsec") {
		t.Errorf("without a policy: %+v", e)
	}
}

// What netfilter may do first is told: a rule of another program.
func TestExplainForeignRule(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	pod, world := n.PodAddrs[0].V4, n.WorldAddr.V4
	if e := n.about(pod, world); strings.Contains(strings.Join(e.Notes, " "), "another program") {
		t.Errorf("without a rule: %+v", e)
	}
	n.tables("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-s", "10.0.0.0/8", "-o", "eth0", "-j", "MASQUERADE")
	e := n.explain("--src="+pod.String(), "--dst="+world.String())
	n.wantNote(e, "a rule of another program may translate this packet", "table nat, chain POSTROUTING: ", "-s 10.0.0.0/8")
	n.inBPF(func() { n.wantNote(e, "before the programs see it") })
}

// Where policy.json is missing or says something else, the kernel has the last word.
func TestExplainStalePolicy(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+n.writeList("198.51.100.0/24"))
	n.kill()
	pod := n.PodAddrs[0].V4
	n.changePolicyFile(func(text string) string { return strings.ReplaceAll(text, "198.51.100.0/24", "198.51.101.0/24") })
	e := n.about(pod, n.Excluded.V4)
	n.wantExplained(e, agent.Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "198.51.100.0/24", Device: "eth0"})
	n.wantNote(e, "policy.json says masq-new", "kernel")
	n.changePolicyFile(func(string) string { return "" })
	e = n.about(pod, n.Excluded.V4)
	n.wantExplained(e, agent.Explanation{Verdict: "pass", Reason: "pass-nonmasq", Match: "198.51.100.0/24", Device: "eth0"})
	n.wantNote(e, "policy.json")
	if e := n.about(pod, n.WorldAddr.V4); e.Reason != "masq-new" || e.Address != n.NodeAddr.V4.String() {
		t.Errorf("without policy.json: %+v", e)
	}
}

// What can't be asked, and how the command says so.
func TestExplainRefuses(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	pod := n.PodAddrs[0].V4.String()
	wants := func(code int, args []string, texts ...string) {
		t.Helper()
		r := n.try(append([]string{"explain", "--src=" + pod}, args...)...)
		if r.code != code || r.stdout != "" || !strings.HasPrefix(r.stderr, "error: ") {
			t.Errorf("explain %v: exit status %d\n%s%s", args, r.code, r.stdout, r.stderr)
		}
		for _, text := range texts {
			if !strings.Contains(r.stderr, text) {
				t.Errorf("explain %v: %q is missing in\n%s", args, text, r.stderr)
			}
		}
	}
	wants(1, []string{"--dst=1.1.1.1"}, "no data plane", "hint: start it with")
	n.start(podCIDRs)
	wants(2, []string{"--dst=1.1.1.1", "--device=eth7"}, "--device eth7: no such device", "masquerade devices are eth0")
	must(t, n.Node.DelRoute(lab.Route{Dst: lab.DefaultRoute4, Via: n.WorldAddr.V4, Dev: "eth0"}))
	wants(1, []string{"--dst=1.1.1.1"}, "route to 1.1.1.1: none", "hint: ", "--device")
	n.cli("explain", "--src="+pod, "--dst=1.1.1.1", "--device=eth0")
}
