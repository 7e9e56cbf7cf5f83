package e2e_test

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// masquerader is what a network plugin writes to masquerade pods, in the shape of its rules.
type masquerader struct {
	name    string
	install func(n *node)
	shown   []string // in the status
	take    string   // what take-over can name
}

// bothFamilies puts the pods' networks and the cluster's into rules of a chain.
func (n *node) bothFamilies(rules string) {
	n.t.Helper()
	fill := strings.NewReplacer
	n.restore(cmp.Or(suiteBackend, "nft"),
		fill("POD", "10.0.1.2", "NODE", "10.0.1.0/24", "CLUSTER", "10.0.0.0/16", "MULTICAST", "224.0.0.0/4", "ADDRESS", n.NodeAddr.V4.String(), "FAMILY", "4").Replace(rules),
		fill("POD", "fd00:1::2", "NODE", "fd00:1::/64", "CLUSTER", "fd00::/16", "MULTICAST", "ff00::/8", "ADDRESS", n.NodeAddr.V6.String(), "FAMILY", "6").Replace(rules))
}

var masqueraders = []masquerader{
	{"flannel", func(n *node) {
		n.bothFamilies(`:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
-A FLANNEL-POSTRTG -s NODE -d CLUSTER -j RETURN
-A FLANNEL-POSTRTG -s CLUSTER -d NODE -j RETURN
-A FLANNEL-POSTRTG ! -s CLUSTER -d NODE -j RETURN
-A FLANNEL-POSTRTG -s CLUSTER ! -d MULTICAST -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s CLUSTER -d CLUSTER -j MASQUERADE --random-fully
`)
	}, []string{"IPv4, table nat, chain FLANNEL-POSTRTG", "IPv6, table nat, chain FLANNEL-POSTRTG"}, "FLANNEL-POSTRTG"},
	{"flannel, nftables", func(n *node) {
		n.tables("nft", "-f", n.write("rules", `table ip flannel-ipv4 {
	chain postrtg {
		type nat hook postrouting priority srcnat
		ip saddr 10.0.1.0/24 ip daddr 10.0.0.0/16 return
		ip saddr 10.0.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
	}
}
table ip6 flannel-ipv6 {
	chain postrtg {
		type nat hook postrouting priority srcnat
		ip6 saddr fd00:1::/64 ip6 daddr fd00::/16 return
		ip6 saddr fd00::/16 ip6 daddr != ff00::/8 masquerade fully-random
	}
}
`))
	}, []string{"table ip flannel-ipv4, chain postrtg", "table ip6 flannel-ipv6, chain postrtg"}, "ip saddr 10.0.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random"},
	{"Calico", func(n *node) {
		for family, pool := range map[string]string{"4": "10.0.0.0/16", "6": "fd00::/16"} {
			inet := map[string]string{"4": "inet", "6": "inet6"}[family]
			for _, kind := range []string{"masq", "all"} {
				set := "cali" + family + "0" + kind + "-ipam-pools"
				n.tables("ipset", "create", set, "hash:net", "family", inet)
				n.tables("ipset", "add", set, pool)
			}
		}
		n.bothFamilies(`:cali-POSTROUTING - [0:0]
:cali-nat-outgoing - [0:0]
-A POSTROUTING -j cali-POSTROUTING
-A cali-POSTROUTING -j cali-nat-outgoing
-A cali-nat-outgoing -m set --match-set caliFAMILY0masq-ipam-pools src -m set ! --match-set caliFAMILY0all-ipam-pools dst -j MASQUERADE --random-fully
`)
	}, []string{"IPv4, table nat, chain cali-nat-outgoing", "IPv6, table nat, chain cali-nat-outgoing"},
		"-A cali-nat-outgoing -m set --match-set cali40masq-ipam-pools src -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully"},
	{"AWS VPC CNI", func(n *node) {
		n.bothFamilies(`:AWS-SNAT-CHAIN-0 - [0:0]
-A POSTROUTING -m comment --comment "AWS SNAT CHAIN" -j AWS-SNAT-CHAIN-0
-A AWS-SNAT-CHAIN-0 -d CLUSTER -m comment --comment "AWS SNAT CHAIN" -j RETURN
-A AWS-SNAT-CHAIN-0 ! -o vlan+ -m addrtype ! --dst-type LOCAL -j SNAT --to-source ADDRESS --random-fully
`)
	}, []string{"IPv4, table nat, chain AWS-SNAT-CHAIN-0", "IPv6, table nat, chain AWS-SNAT-CHAIN-0"}, "AWS-SNAT-CHAIN-0"},
	{"kindnet", func(n *node) {
		n.tables("nft", "-f", n.write("rules", `table inet kindnet-ipmasq {
	set noMasqV4 { type ipv4_addr; flags interval; elements = { 10.0.0.0/16 } }
	set noMasqV6 { type ipv6_addr; flags interval; elements = { fd00::/16 } }
	chain postrouting {
		type nat hook postrouting priority srcnat - 10
		ct state established,related accept
		fib daddr type local accept
		ip daddr @noMasqV4 accept
		ip6 daddr @noMasqV6 accept
		masquerade
		counter
	}
}
`))
	}, []string{"table inet kindnet-ipmasq, chain postrouting: masquerade"}, "masquerade"},
	{"kind's own kindnetd", func(n *node) {
		n.bothFamilies(`:KIND-MASQ-AGENT - [0:0]
-A POSTROUTING -m addrtype ! --dst-type LOCAL -m comment --comment "kind-masq-agent: all but local" -j KIND-MASQ-AGENT
-A KIND-MASQ-AGENT -d CLUSTER -m comment --comment "kind-masq-agent: pods" -j RETURN
-A KIND-MASQ-AGENT -m comment --comment "kind-masq-agent: the rest" -j MASQUERADE
`)
	}, []string{"IPv4, table nat, chain KIND-MASQ-AGENT", "IPv6, table nat, chain KIND-MASQ-AGENT"}, "KIND-MASQ-AGENT"},
	{"CNI plugins with ipMasq", func(n *node) {
		n.bothFamilies(`:CNI-0f3a9c - [0:0]
-A POSTROUTING -s POD -m comment --comment "name: \"pods\" id: \"c1\"" -j CNI-0f3a9c
-A CNI-0f3a9c -d NODE -j ACCEPT
-A CNI-0f3a9c ! -d MULTICAST -j MASQUERADE
`)
	}, []string{"IPv4, table nat, chain CNI-0f3a9c", "IPv6, table nat, chain CNI-0f3a9c"}, "CNI-0f3a9c"},
	{"CNI plugins with ipMasq, nftables", func(n *node) {
		n.tables("nft", "-f", n.write("rules", `table inet cni_plugins_masquerade {
	chain masq_checks {
		ip saddr 10.0.1.2 ip daddr != 10.0.1.0/24 masquerade
		ip6 saddr fd00:1::2 ip6 daddr != fd00:1::/64 masquerade
	}
	chain postrouting {
		type nat hook postrouting priority srcnat
		ip daddr 224.0.0.0/4 return
		ip6 daddr ff00::/8 return
		goto masq_checks
	}
}
`))
	}, []string{"table inet cni_plugins_masquerade, chain masq_checks: ip saddr 10.0.1.2", "table inet cni_plugins_masquerade, chain masq_checks: ip6 saddr fd00:1::2"},
		"ip saddr 10.0.1.2 ip daddr != 10.0.1.0/24 masquerade"},
}

// Whoever else masquerades pods is named in the status, as docs/coexistence.md shows it, and pods
// come to the world with the node's address, whoever translates them.
func TestMasqueradersOfOthers(t *testing.T) {
	for _, m := range masqueraders {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, lab.Options{})
			m.install(n)
			n.start(podCIDRs)
			w := n.tapWorld()
			n.masqueraded(w)
			labtest.Eventually(t, 45*time.Second, func() error {
				out := n.try("status").stdout
				for _, text := range m.shown {
					if !strings.Contains(out, text) {
						return fmt.Errorf("status does not have %q:\n%s", text, out)
					}
				}
				return nil
			})
			out := n.cli("agent", podCIDRs, "--dry-run", "--take-over", m.take)
			if !regexp.MustCompile(`[1-9]\d* would (be imported|go on)`).MatchString(out) || !strings.Contains(out, "Would be removed") {
				t.Errorf("dry run:\n%s", out)
			}
		})
	}
}
