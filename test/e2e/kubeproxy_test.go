package e2e_test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// services are addresses of a cluster, as a service proxy translates them.
type services struct {
	node     *node
	external [2]netip.AddrPort // ClusterIP whose endpoint is in the world
	internal [2]netip.AddrPort // ClusterIP whose endpoint is pod 1
	world    [2]netip.AddrPort
	pod      [2]netip.AddrPort
}

// Node ports towards pod 1, by external traffic policy.
const (
	nodePortCluster = 30080
	nodePortLocal   = 30081
)

var clusterIPs = [2][2]netip.Addr{
	{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("10.96.0.20")},
	{netip.MustParseAddr("fd00:96::10"), netip.MustParseAddr("fd00:96::20")},
}

func newServices(t *testing.T, n *node) *services {
	s := &services{node: n}
	for i, world := range n.WorldAddr.All() {
		s.world[i] = server(t, lab.EchoTCP, n.World, anyPort(world))
		s.pod[i] = server(t, lab.EchoTCP, n.Pods[1], anyPort(n.PodAddrs[1].Of(world)))
		s.external[i] = netip.AddrPortFrom(clusterIPs[i][0], 80)
		s.internal[i] = netip.AddrPortFrom(clusterIPs[i][1], 80)
	}
	return s
}

// The rules have the shape of kube-proxy's, in its two modes: what is to be masqueraded gets a
// mark, and POSTROUTING masquerades what is marked. Nothing else matches a pod.

// iptables writes the rules of a family for iptables-restore.
func (s *services) iptables(i int) string {
	podRange := [2]netip.Prefix{lab.PodRange4, lab.PodRange6}[i]
	return fmt.Sprintf(`*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-EXTERNAL - [0:0]
:KUBE-SVC-INTERNAL - [0:0]
:KUBE-EXT-CLUSTER - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d %[1]s -p tcp -m tcp --dport 80 -j KUBE-SVC-EXTERNAL
-A KUBE-SERVICES -d %[2]s -p tcp -m tcp --dport 80 -j KUBE-SVC-INTERNAL
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport %[3]d -j KUBE-EXT-CLUSTER
-A KUBE-NODEPORTS -p tcp -m tcp --dport %[4]d -j KUBE-SVC-INTERNAL
-A KUBE-EXT-CLUSTER -j KUBE-MARK-MASQ
-A KUBE-EXT-CLUSTER -j KUBE-SVC-INTERNAL
-A KUBE-SVC-EXTERNAL ! -s %[5]s -j KUBE-MARK-MASQ
-A KUBE-SVC-EXTERNAL -p tcp -m tcp -j DNAT --to-destination %[6]s
-A KUBE-SVC-INTERNAL -s %[7]s -j KUBE-MARK-MASQ
-A KUBE-SVC-INTERNAL -p tcp -m tcp -j DNAT --to-destination %[8]s
COMMIT
`, s.external[i].Addr(), s.internal[i].Addr(), nodePortCluster, nodePortLocal, podRange, s.world[i], s.pod[i].Addr(), s.pod[i])
}

// nftables writes the rules of a family for nft.
func (s *services) nftables(i int) string {
	f := [2]string{"ip", "ip6"}[i]
	podRange := [2]netip.Prefix{lab.PodRange4, lab.PodRange6}[i]
	return fmt.Sprintf(`table %[1]s kube-proxy {
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain masquerading {
		meta mark and 0x4000 == 0 return
		meta mark set meta mark xor 0x4000
		masquerade fully-random
	}
	chain external { %[1]s saddr != %[6]s jump mark-for-masquerade; meta l4proto tcp dnat to %[7]s; }
	chain internal { %[1]s saddr %[8]s jump mark-for-masquerade; meta l4proto tcp dnat to %[9]s; }
	chain cluster { jump mark-for-masquerade; goto internal; }
	map service-ips {
		type %[10]s . inet_proto . inet_service : verdict
		elements = { %[2]s . tcp . 80 : goto external, %[3]s . tcp . 80 : goto internal }
	}
	map service-nodeports {
		type inet_proto . inet_service : verdict
		elements = { tcp . %[4]d : goto cluster, tcp . %[5]d : goto internal }
	}
	chain services {
		%[1]s daddr . meta l4proto . th dport vmap @service-ips
		fib daddr type local meta l4proto . th dport vmap @service-nodeports
	}
	chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain nat-output { type nat hook output priority -100; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
}
`, f, s.external[i].Addr(), s.internal[i].Addr(), nodePortCluster, nodePortLocal, podRange, s.world[i], s.pod[i].Addr(), s.pod[i],
		[2]string{"ipv4_addr", "ipv6_addr"}[i])
}

// install puts the rules in force.
func (s *services) install(t *testing.T, proxy string) {
	t.Helper()
	for i := range s.world {
		tool, text := labtest.Tool(t, "nft"), s.nftables(i)
		args := []string{"-f"}
		if proxy != "nftables" {
			tool = labtest.Tool(t, [2]string{"iptables", "ip6tables"}[i]+strings.TrimPrefix(proxy, "iptables")+"-restore")
			args, text = []string{"-n"}, s.iptables(i)
		}
		file := s.node.write("kube-proxy", text)
		if out, err := s.node.Node.Run(within(t, 20*time.Second), tool, append(args, file)...); err != nil {
			t.Fatalf("%s: %v\n%s\n%s", filepath.Base(tool), err, out, text)
		}
	}
}

// check talks to the services and looks at what each server sees of its client.
func (s *services) check(t *testing.T) {
	t.Helper()
	n := s.node
	ask := func(what string, from *lab.NS, to netip.AddrPort, want ...netip.Addr) {
		t.Helper()
		seen, conn, err := lab.AskTCP(within(t, 20*time.Second), from, netip.AddrPort{}, to)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		conn.Close()
		for _, a := range want {
			if seen.Addr() == a {
				return
			}
		}
		t.Errorf("%s: the server saw %s, want %v", what, seen.Addr(), want)
	}
	for i := range s.world {
		world := s.world[i].Addr()
		at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.NodeAddr.Of(world), port) }
		gateway, pod := n.PodGateway.Of(world), n.PodAddrs[0].Of(world)
		ask("pod to a service in the world", n.Pods[0], s.external[i], n.NodeAddr.Of(world))
		ask("pod to a service on another pod", n.Pods[0], s.internal[i], pod)
		ask("pod to a service on itself", n.Pods[1], s.internal[i], gateway, n.NodeAddr.Of(world))
		ask("node to a service in the world", n.Node, s.external[i], n.NodeAddr.Of(world))
		ask("world to a node port, policy Cluster", n.World, at(nodePortCluster), gateway, n.NodeAddr.Of(world))
		ask("world to a node port, policy Local", n.World, at(nodePortLocal), world)
		ask("pod to a node port, policy Cluster", n.Pods[0], at(nodePortCluster), gateway, n.NodeAddr.Of(world))
		ask("pod to the world", n.Pods[0], s.world[i], n.NodeAddr.Of(world))
	}
}

// What kube-proxy does goes on working beside us, whoever came first, in each mode and with
// each shape of its rules.
func TestKubeProxy(t *testing.T) {
	setsModes(t)
	t.Parallel()
	for _, ours := range []string{"", "nft", "legacy"} {
		for _, proxy := range []string{"nftables", "iptables-nft", "iptables-legacy"} {
			for _, first := range []string{"proxy", "agent"} {
				mode := "eBPF"
				if ours != "" {
					mode = "iptables-" + ours
				}
				t.Run(mode+", "+proxy+", "+first+" first", func(t *testing.T) {
					t.Parallel()
					testKubeProxy(t, ours, proxy, first == "proxy")
				})
			}
		}
	}
}

func testKubeProxy(t *testing.T, ours, proxy string, proxyFirst bool) {
	n := newNode(t, lab.Options{Pods: 2})
	args := []string{podCIDRs}
	if ours != "" {
		n.useBackend(ours)
		// The one with more rules would be the proxy's. On a node with one it is kubelet's hint that
		// decides, though it should be the same.
		for _, family := range []string{"iptables-", "ip6tables-"} {
			n.tables(family+ours, "-t", "mangle", "-N", "KUBE-IPTABLES-HINT")
		}
		args = append(args, iptablesMode)
	}
	s := newServices(t, n)
	if proxyFirst {
		s.install(t, proxy)
	}
	n.start(args...)
	if !proxyFirst {
		s.install(t, proxy)
	}
	wire := n.watchWire()
	s.check(t)
	wire.check(t)
	if tier := n.status().Datapath.Tier; ours != "" && tier != "iptables-"+ours {
		t.Errorf("rules of ours are in %s, want iptables-%s", tier, ours)
	}
}
