package e2e_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// ownThings are rules, chains of users and sets in the node: tables and their own
// chains come with the first look at them.
func (n *node) ownThings() string {
	n.t.Helper()
	var out strings.Builder
	keep := regexp.MustCompile(`(?m)^(-A .*|:\S+ - .*)$`)
	counters := regexp.MustCompile(` \[\d+:\d+\]`)
	for _, backend := range ruleBackends {
		for _, family := range []string{"iptables", "ip6tables"} {
			save := family + "-" + backend + "-save"
			text := counters.ReplaceAllString(n.tables(save), "")
			fmt.Fprintf(&out, "$ %s\n%s\n", save, strings.Join(keep.FindAllString(text, -1), "\n"))
		}
	}
	fmt.Fprintf(&out, "$ ipset list -n\n%s", n.tables("ipset", "list", "-n"))
	return out.String()
}

// masqueraded sends TCP, UDP and a ping in both families, and compares the source.
func (n *node) masqueraded(w *uplink) {
	n.t.Helper()
	for _, dst := range n.WorldAddr.All() {
		node, pod := n.NodeAddr.Of(dst), n.PodAddrs[0].Of(dst)
		tcp, udp := server(n.t, lab.EchoTCP, n.World, anyPort(dst)), server(n.t, lab.EchoUDP, n.World, anyPort(dst))
		seen, conn, err := lab.AskTCP(within(n.t, patience), n.Pods[0], anyPort(pod), tcp)
		must(n.t, err)
		conn.Close()
		if seen.Addr() != node {
			n.t.Errorf("TCP to %s came from %s", dst, seen)
		}
		if seen, err = lab.AskUDP(within(n.t, patience), n.Pods[0], anyPort(pod), udp, []byte("x")); err != nil || seen.Addr() != node {
			n.t.Errorf("UDP to %s came from %s, %v", dst, seen, err)
		}
		if _, err := lab.Ping(within(n.t, patience), n.Pods[0], dst, 4242, 1, 32); err != nil {
			n.t.Errorf("ping to %s: %v", dst, err)
		}
		labtest.Eventually(n.t, patience, func() error {
			f, ok := w.find(func(p lab.Packet) bool {
				f, _ := lab.ParseFrame(p.Data)
				typ, _, _, isICMP := f.ICMP()
				return isICMP && f.Dst == dst && (typ == 8 || typ == 128)
			})
			if !ok || f.Src != node {
				return fmt.Errorf("ping to %s came from %s", dst, f.Src)
			}
			return nil
		})
	}
}

// What a user sees of iptables mode while the agent runs.
func TestIPTablesMode(t *testing.T) {
	inEachBackend(t, lab.Options{SecondUplink: true}, func(t *testing.T, n *node, backend string) {
		list := n.writeList("198.51.100.0/24", "2001:db8:99::/64")
		nodes := n.write("nodes", "198.18.5.77 node7 ExternalIP\n")
		n.start(iptablesMode, podCIDRs, "--egress-masquerade-interfaces=eth0,wlan+", "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list,
			"--nodes-file="+nodes, "--nat-timeout-udp=10s")
		w, wire := n.tapWorld(), n.watchWire(netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:99::1"),
			netip.MustParseAddr("198.18.5.77"), netip.MustParseAddr("198.51.101.1"))
		n.masqueraded(w)
		for _, excluded := range []string{"198.51.100.1", "2001:db8:99::1", "198.18.5.77"} {
			a := netip.MustParseAddr(excluded)
			w.want(a, n.PodAddrs[0].Of(a))
		}

		if got, want := n.statusLine(), "Masquerading:   IPTables (ip-masq-agent) [IPv4: Enabled, IPv6: Enabled]"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
		out := n.cli("status")
		for _, text := range []string{"iptables-" + backend, "eth0   attached   iptables   " + n.NodeAddr.V4.String(), "connections of all kinds",
			`nat-timeout-udp "10s"`, "198.51.100.0/24"} {
			if !strings.Contains(out, text) {
				t.Errorf("status does not have %q:\n%s", text, out)
			}
		}
		for _, text := range []string{"from outside", "worst remote", "eth1"} {
			if strings.Contains(out, text) {
				t.Errorf("status has %q:\n%s", text, out)
			}
		}
		st := n.status()
		if st.Masquerading.Mode != "iptables" || st.Flows.Conntrack == nil || st.Flows.Conntrack.Entries == 0 || !slices.Equal(attached(st), []string{"eth0"}) {
			t.Errorf("%+v %+v %+v", st.Masquerading, st.Flows, st.Devices)
		}
		if out := n.cli("status", "--brief"); out != "OK\n" {
			t.Errorf("status --brief: %q", out)
		}
		n.wantList("169.254.0.0/16 198.51.100.0/24 2001:db8:99::/64 fe80::/10")
		if out := n.cli("bpf", "node", "list"); !strings.Contains(out, "198.18.5.77   node7   ExternalIP") {
			t.Errorf("bpf node list:\n%s", out)
		}

		var took []time.Duration
		for i := range 3 {
			prefix := fmt.Sprintf("198.51.10%d.0/24", i+1)
			n.writeList(prefix)
			took = append(took, n.awaitKernel("169.254.0.0/16 "+prefix+" fe80::/10"))
			if i == 0 {
				w.want(netip.MustParseAddr("198.51.101.1"), n.PodAddrs[0].V4)
			}
		}
		within1s(t, "the file in the kernel", took...)
		w.want(netip.MustParseAddr("198.51.100.2"), n.NodeAddr.V4)
		wire.check(t)
	})
}

// What others do to our rules is healed within 5 s.
func TestIPTablesModeHeals(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		n.start(iptablesMode, podCIDRs)
		w := n.tapWorld()
		w.want(n.WorldAddr.V4, n.NodeAddr.V4)
		tool := "iptables-" + backend
		for _, harm := range [][]string{
			{"-t", "nat", "-F"},
			{"-t", "nat", "-F", "POSTROUTING"},
			{"-t", "nat", "-I", "POSTROUTING", "-s", "10.0.0.0/8", "-j", "ACCEPT"},
			{"-t", "mangle", "-F", "POSTROUTING"},
		} {
			before := n.tables(tool+"-save", "-t", harm[1])
			n.tables(tool, harm...)
			start := time.Now()
			labtest.Eventually(t, patience, func() error {
				now := n.tables(tool+"-save", "-t", harm[1])
				if !strings.Contains(now, firstOwnRule(before)) {
					return fmt.Errorf("no jump first:\n%s", now)
				}
				if rule := firstOwnRule(now); rule != firstOwnRule(before) {
					return fmt.Errorf("the first rule is %s", rule)
				}
				return nil
			})
			took := time.Since(start)
			t.Logf("%q: healed after %v", harm, took)
			if took > labtest.Patience(5*time.Second) {
				t.Errorf("%q: healed after %v", harm, took)
			}
			w.await(n.WorldAddr.V4, n.NodeAddr.V4)
		}
		n.awaitOK()
	})
}

// firstOwnRule is the first rule of POSTROUTING.
func firstOwnRule(save string) string {
	for line := range strings.Lines(save) {
		if strings.HasPrefix(line, "-A POSTROUTING ") {
			return strings.TrimSpace(line)
		}
	}
	return "none"
}

// Rules and lists outlive the agent, and the next one goes on from them.
func TestIPTablesModeWithAgentDown(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		list := n.writeList("198.51.100.0/24")
		n.start(iptablesMode, podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list, "--nodes-file="+n.write("nodes", "198.18.5.77 node7\n"))
		w := n.tapWorld()
		echo := server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4))
		conn, seen := n.talk(0, echo, 40001)
		lists := func() string {
			return n.cli("bpf", "ipmasq", "list") + n.cli("bpf", "node", "list") + withoutAge(n.cli("bpf", "nat", "list", "--proto=tcp"))
		}
		running, things := lists(), n.ownThings()
		want := fmt.Sprintf("TCP OUT 10.0.1.2:40001 -> %s XLATE_SRC %s Created=Nsec ago State=established\n"+
			"TCP IN %[1]s -> %[2]s XLATE_DST 10.0.1.2:40001 Created=Nsec ago State=established\n", echo, seen)
		if !strings.Contains(running, want) || !strings.Contains(running, "\n198.51.100.0/24\n") || !strings.Contains(running, "node7") {
			t.Errorf("%s\nwant in it:\n%s", running, want)
		}
		n.kill()
		if down := lists(); down != running {
			t.Errorf("with the agent down:\n%swant:\n%s", down, running)
		}
		if diff := cmp.Diff(things, n.ownThings()); diff != "" {
			t.Errorf("rules after the agent was killed (-before +after):\n%s", diff)
		}
		r := n.try("status")
		if r.code != 3 || !strings.HasPrefix(r.stdout, "Masquerading:   IPTables (ip-masq-agent) [IPv4: Enabled, IPv6: Enabled]\nHealth:         agent down\n") {
			t.Errorf("status: exit %d\n%s%s", r.code, r.stdout, r.stderr)
		}
		w.want(n.WorldAddr.V4, n.NodeAddr.V4)
		w.want(netip.MustParseAddr("198.51.100.9"), n.PodAddrs[0].V4)
		if out := n.cli("bpf", "nat", "flush", "--proto=udp"); !strings.HasPrefix(out, "Flushed ") || n.try("bpf", "nat", "list", "--proto=udp").stdout != "" {
			t.Errorf("flush: %q", out)
		}
		if !answers(conn) {
			t.Error("a connection does not answer")
		}
		// Without policy.json the kernel tells.
		must(t, os.Remove(filepath.Join(n.runDir, "policy.json")))
		n.wantList("169.254.0.0/16 198.51.100.0/24 fe80::/10")
		if line := n.statusLine(); !strings.HasPrefix(line, "Masquerading:   ") {
			t.Errorf("status without policy.json: %s", line)
		}
		n.start(n.agent.args...)
		n.awaitOK()
		if !answers(conn) {
			t.Error("a connection does not answer after a restart")
		}
	})
}

// cleanup takes away all there is, in both backends, and twice without harm.
func TestIPTablesModeCleanup(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		before := n.ownThings()
		n.start(iptablesMode, podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+n.writeList("198.51.100.0/24"))
		w := n.tapWorld()
		w.want(n.WorldAddr.V4, n.NodeAddr.V4)
		if n.ownThings() == before {
			t.Error("the listing does not show the rules: it proves nothing")
		}
		wantError(t, n.try("cleanup"), 1, "an agent runs here", "hint: --force")
		runDir := n.runDir
		n.runDir += "2"
		wantError(t, n.try("cleanup"), 1, "the rules of this network namespace", "hint: --run-dir")
		wantError(t, n.try("agent", iptablesMode, podCIDRs), 1, "another agent in iptables mode", "hint: stop")
		n.runDir = runDir
		n.stop()
		out := n.cli("cleanup")
		for _, text := range []string{"Removed ", backend, "BAUTA-POSTROUTING", runDir} {
			if !strings.Contains(out, text) {
				t.Errorf("cleanup does not name %s:\n%s", text, out)
			}
		}
		if diff := cmp.Diff(before, n.ownThings()); diff != "" {
			t.Errorf("what cleanup left, or took (-before +after):\n%s", diff)
		}
		w.want(n.WorldAddr.V4, n.PodAddrs[0].V4)
		if out := n.cli("cleanup"); out != "Nothing to remove\n" {
			t.Errorf("second cleanup: %q", out)
		}
		wantError(t, n.try("status"), 1, "no agent and no data plane")
		wantError(t, n.try("bpf", "nat", "list"), 1, "no data plane")
	})
}

// The source of the route, followed as it changes (2.4).
func TestIPTablesModeRouteSource(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, backend string) {
		testRouteSource(n, routeCases[slices.Index(ruleBackends, backend)], iptablesMode)
	})
}

// An address that leaves takes its flows along within a second, and no others: netfilter by
// itself would go on translating to it.
func TestIPTablesModeLosesAddress(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		n.start(iptablesMode, podCIDRs)
		w, wire := n.tapWorld(), n.watchWire()
		old, other := n.NodeAddr.V4, netip.MustParseAddr("192.0.2.66")
		w.want(n.WorldAddr.V4, old)
		w.want(n.WorldAddr.V6, n.NodeAddr.V6)
		must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(old, 24)))
		within1s(t, "flows of the vanished address gone", n.awaitNoMappingOf(old))
		if out := n.cli("bpf", "nat", "list"); !strings.Contains(out, "XLATE_SRC ["+n.NodeAddr.V6.String()+"]") {
			t.Errorf("flows of another address are gone too:\n%s", out)
		}
		// Without an address nothing leaves; only with a route do packets still come to the device.
		n.awaitDegraded("no IPv4 address")
		must(t, n.Node.AddRoute(lab.Route{Dst: lab.DefaultRoute4, Dev: "eth0"}))
		lost := w.send(netip.Addr{}, n.WorldAddr.V4)
		n.await("a drop", func(st agent.Status) bool { return st.Drops["drop-no-address"] == 1 })
		if out := n.try("status").stdout; !strings.Contains(out, "Drops:          drop-no-address   1") {
			t.Errorf("status does not show the drop:\n%s", out)
		}
		start := time.Now()
		must(t, n.Node.AddAddr("eth0", netip.PrefixFrom(other, 24)))
		n.awaitOK()
		within1s(t, "another address used", time.Since(start))
		w.want(n.WorldAddr.V4, other)
		if f, ok := w.find(lost); ok {
			t.Errorf("left without an address: %s", f)
		}
		wire.check(t)
	})
}

// These capabilities are enough.
func TestIPTablesModePrivileges(t *testing.T) {
	inEachBackend(t, lab.Options{}, func(t *testing.T, n *node, _ string) {
		agent := filepath.Join(n.dir, "agent")
		must(t, os.WriteFile(agent, fmt.Appendf(nil, "#!/bin/sh\nexec %s --bounding-set=-all,+net_admin,+net_raw %s \"$@\"\n", labtest.Tool(t, "setpriv"), n.bin), 0o700))
		bin := n.bin
		n.bin = agent
		n.start(iptablesMode, podCIDRs)
		n.bin = bin
		n.masqueraded(n.tapWorld())
		n.awaitOK()
	})
}

// Rules of others that masquerade pods too are named, in both modes.
func TestForeignRule(t *testing.T) {
	setsModes(t)
	for _, mode := range []string{iptablesMode, "--enable-bpf-masquerade=true"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, lab.Options{})
			n.tables("iptables-nft", "-t", "nat", "-A", "POSTROUTING", "-s", "10.0.0.0/8", "-o", "eth0", "-j", "MASQUERADE")
			n.start(mode, podCIDRs)
			n.await("a warning of the rule", func(st agent.Status) bool {
				return slices.ContainsFunc(st.Warnings, func(w string) bool {
					return strings.Contains(w, "table nat, chain POSTROUTING: ") && strings.Contains(w, "-s 10.0.0.0/8") && strings.Contains(w, "MASQUERADE")
				})
			})
		})
	}
}

// While somebody holds the lock of the legacy backend, nothing is in force and the status
// says whose fault it is; afterwards all is well by itself.
func TestIPTablesModeLocked(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.tables("iptables-legacy", "-A", "INPUT", "-p", "sctp", "--dport", "1", "-j", "ACCEPT")
	lock, err := os.OpenFile(filepath.Join(n.dir, "xtables.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	defer lock.Close()
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	n.launch(iptablesMode, podCIDRs, "--iptables-lock-timeout=1s")
	st := n.awaitDegraded("xtables lock")
	if st.Agent.Ready {
		t.Error("ready without a rule")
	}
	wantBrief(t, n, "policy not applied", "xtables lock")
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN))
	n.waitReady()
	n.awaitOK()
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
}

// Both families off: nothing is translated, and that is fine.
func TestIPTablesModeOff(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.start(iptablesMode, podCIDRs, "--enable-ipv4-masquerade=false", "--enable-ipv6-masquerade=false")
	if line := n.statusLine(); line != "Masquerading:   Disabled" {
		t.Error(line)
	}
	n.awaitOK()
	n.tapWorld().want(n.WorldAddr.V4, n.PodAddrs[0].V4)
}

// A node without ip6tables masquerades IPv4, and says what is missing; if it has no IPv6 pods,
// nothing is.
func TestIPTablesModeWithoutIP6Tables(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	multi, err := filepath.EvalSymlinks(labtest.Tool(t, "iptables-nft"))
	must(t, err)
	sbin := filepath.Join(n.dir, "sbin")
	must(t, os.Mkdir(sbin, 0o700))
	data, err := os.ReadFile(multi)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(sbin, "multi"), data, 0o700))
	for _, name := range []string{"iptables", "iptables-nft", "iptables-nft-save", "iptables-nft-restore"} {
		must(t, os.Symlink("multi", filepath.Join(sbin, name)))
	}
	start := func(args ...string) {
		t.Helper()
		wrapper, bin := filepath.Join(n.dir, "agent"), n.bin
		must(t, os.WriteFile(wrapper, fmt.Appendf(nil, "#!/bin/sh\nexec %s -m --propagation private sh -c 'mount --bind %s %s && exec \"$@\"' sh %s \"$@\"\n",
			labtest.Tool(t, "unshare"), sbin, filepath.Dir(multi), bin), 0o700))
		n.bin = wrapper
		n.start(append(args, iptablesMode)...)
		n.bin = bin
	}
	start("--pod-cidrs=" + lab.PodRange4.String())
	n.awaitOK()
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
	n.stop()
	start(podCIDRs)
	n.awaitDegraded("ip6tables")
	n.tapWorld().want(n.WorldAddr.V4, n.NodeAddr.V4)
}

// Without iptables the agent says what to install, or to do without.
func TestIPTablesModeWithoutBinaries(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	run := func(args ...string) result {
		t.Helper()
		// A mount namespace of its own, with nothing where the programs are.
		dirs := make(map[string]bool)
		for _, name := range []string{"iptables-nft-restore", "iptables-legacy-restore", "iptables-restore"} {
			if path, err := exec.LookPath(name); err == nil {
				dir, err := filepath.EvalSymlinks(filepath.Dir(path))
				must(t, err)
				dirs[dir] = true
			}
		}
		script := ""
		for dir := range dirs {
			script += "mount -t tmpfs none " + dir + " && "
		}
		script += `exec "$@"`
		bin := n.bin
		n.bin = labtest.Tool(t, "unshare")
		defer func() { n.bin = bin }()
		return n.try(append([]string{"-m", "--propagation", "private", "sh", "-c", script, "sh", bin}, args...)...)
	}
	wantError(t, run("agent", iptablesMode, podCIDRs), 1, "iptables", "not installed", "hint: install", "hint: enable-bpf-masquerade=true")
	if _, err := os.Stat(n.runDir); !os.IsNotExist(err) {
		t.Errorf("run directory of the refused agent: %v", err)
	}
	r := run("cleanup")
	if r.code != 0 || r.stdout != "Nothing to remove\n" || !strings.Contains(r.stderr, "note: ") {
		t.Errorf("cleanup: %+v", r)
	}
	wantError(t, run("status"), 1, "no agent and no data plane")
}
