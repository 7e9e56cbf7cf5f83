package e2e_test

import (
	"net/netip"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
)

// A router: all it forwards is masqueraded, but IPv6 only from ULA sources unless
// it was asked for.
func TestMasqueradeForwarded(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	up := n.tapWorld()
	global := netip.MustParseAddr("2001:db8:77::5")
	foreign := netip.MustParseAddr("172.31.0.5")
	for _, a := range []netip.Addr{global, foreign} {
		p := netip.PrefixFrom(a, a.BitLen())
		must(t, n.Pods[0].AddAddr("eth0", p))
		must(t, n.Node.AddRoute(lab.Route{Dst: p, Dev: "pod0"}))
	}
	n.start("--masquerade-forwarded")
	n.awaitOK()
	n.awaitAttached("eth0")
	check := func(global6 netip.Addr) {
		t.Helper()
		for from, want := range map[netip.Addr]netip.Addr{
			n.PodAddrs[0].V4: n.NodeAddr.V4, foreign: n.NodeAddr.V4, n.PodAddrs[0].V6: n.NodeAddr.V6, global: global6,
		} {
			if got := up.sourceFrom(from, n.WorldAddr.Of(from)); got != want {
				t.Errorf("a forwarded packet of %s came from %s, want %s", from, got, want)
			}
		}
	}
	check(global)
	n.restart("--enable-ipv6-masquerade=true")
	check(n.NodeAddr.V6)

	// A family without default route counts for nothing.
	must(t, n.Node.DelRoute(lab.Route{Dst: lab.DefaultRoute6, Via: n.WorldAddr.V6}))
	n.await("IPv6 unused", func(st agent.Status) bool { return st.Sources.IPv6.State == agent.SourcesUnused })
	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V6, 64)))
	n.awaitOK()
}

// A family without source range is shown as unused, and nothing it lacks degrades.
func TestUnusedFamily(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	must(t, n.Node.DelAddr("eth0", netip.PrefixFrom(n.NodeAddr.V6, 64)))
	n.start("--pod-cidrs=10.0.1.0/24")
	out := n.cli("status")
	if line, _, _ := strings.Cut(out, "\n"); line != n.line("Masquerading:   BPF   [eth0]   10.0.1.0/24 [IPv4: Enabled, IPv6: Enabled]") {
		t.Errorf("status:\n%s", out)
	}
	found := false
	for line := range strings.Lines(out) {
		found = found || strings.Contains(line, "IPv6   unused")
	}
	if !found {
		t.Errorf("status does not say that IPv6 is unused:\n%s", out)
	}
	if out := n.cli("status", "--brief"); out != "OK\n" {
		t.Errorf("status --brief: %q", out)
	}
	n.tapWorld().want(n.WorldAddr.V6, n.PodAddrs[0].V6)
}

// Addresses of other nodes, by option and by file.
func TestRemoteNodes(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{RemoteNode: true})
	up := n.tap(n.Remote)
	remote, external := n.RemoteAddr, n.RemoteExternal
	nodes := "# the other nodes\n" + remote.V4.String() + " node2\n" + remote.V6.String() + " node2 InternalIP\n" + external.String() + " node2 ExternalIP\n"
	path := n.write("nodes", nodes)
	n.start(podCIDRs, "--nodes-file="+path, "--node-addresses=198.51.100.200")
	const text = `IP ADDRESS       NODE    TYPE
192.0.2.3        node2   InternalIP
198.51.100.77    node2   ExternalIP
198.51.100.200   -       InternalIP
2001:db8:2::3    node2   InternalIP
`
	if out := n.cli("bpf", "node", "list"); out != text {
		t.Errorf("bpf node list:\n%swant:\n%s", out, text)
	}
	up.want(remote.V4, n.PodAddrs[0].V4)
	up.want(remote.V6, n.PodAddrs[0].V6)
	up.want(external, n.PodAddrs[0].V4)

	n.write("nodes", remote.V6.String()+" node2\n")
	st := n.await("reloaded", func(st agent.Status) bool { return st.Nodes.Addresses == 2 })
	if st.Nodes.Known != 2 || st.Nodes.File != path {
		t.Errorf("%+v", st.Nodes)
	}
	up.want(remote.V4, n.NodeAddr.V4)
	up.want(remote.V6, n.PodAddrs[0].V6)

	n.write("nodes", nodes+"192.0.2.300 node3\n")
	n.awaitDegraded("192.0.2.300")
	wantBrief(t, n, "nodes-file", path+":5", "192.0.2.300")
	up.want(remote.V4, n.NodeAddr.V4) // the last good state
	n.kill()
	n.start(append(n.agent.args, "--remote-node-masquerade=external")...) // and that of the last run
	n.awaitDegraded("192.0.2.300")
	up.want(remote.V6, n.PodAddrs[0].V6)
	n.write("nodes", nodes)
	n.awaitOK()
	up.want(remote.V4, n.PodAddrs[0].V4)
	up.want(external, n.NodeAddr.V4)
	n.restart("--remote-node-masquerade=all")
	up.want(remote.V4, n.NodeAddr.V4)
	up.want(remote.V6, n.NodeAddr.V6)
	up.want(external, n.NodeAddr.V4)
}
