package cluster_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/test/cluster"
)

// warned waits until the status of a node has a warning with the word, or has none.
func warned(t *testing.T, n *cluster.Node, word string, want bool) {
	t.Helper()
	labtest.Eventually(t, 90*time.Second, func() error {
		s, err := statusOf(t, n)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.Contains(w, word) }) != want {
			return fmt.Errorf("%s is to warn of %s: %t; its warnings are %q", n.Name, word, want, s.Warnings)
		}
		return nil
	})
}

// A CNI plugin with ipMasq masquerades what leaves its network, before Bauta sees
// it: the outside sees the node either way, and the status says who does it.
func TestBesideCNIMasquerade(t *testing.T) {
	noLeak(t)
	install(t, "image.variant=iptables") // which can name the rules of others
	n := node(0)
	if err := n.CNIMasquerades(true); err != nil {
		t.Fatal(err)
	}
	p, err := n.StartPod(t.Context(), cluster.PodOptions{Name: "masqueraded"})
	if back := n.CNIMasquerades(false); back != nil {
		t.Fatal(back)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range cluster.World.All() {
		if got := ask(t, p, "tcp", echo(a, "tcp")); got.Source.Addr() != n.Addr.Of(a) {
			t.Errorf("%s saw %s, want the node %s", a, got.Source, n.Addr.Of(a))
		}
	}
	rules, err := n.Run(t.Context(), "iptables-save", "-t", "nat")
	if err != nil || !strings.Contains(rules, "-j MASQUERADE") {
		t.Fatalf("the plugin has made no rule: %v\n%s", err, rules)
	}
	warned(t, n, "CNI-", true)
	if err := p.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	warned(t, n, "CNI-", false)
}

// ipMasqAgentRules are those of kubernetes-sigs/ip-masq-agent, by its own names.
const ipMasqAgentRules = `*nat
:IP-MASQ-AGENT - [0:0]
-A POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
-A IP-MASQ-AGENT -d 169.254.0.0/16 -j RETURN
-A IP-MASQ-AGENT -d 10.0.0.0/8 -j RETURN
-A IP-MASQ-AGENT -d 172.16.0.0/12 -j RETURN
-A IP-MASQ-AGENT -d 192.168.0.0/16 -j RETURN
-A IP-MASQ-AGENT -j MASQUERADE
COMMIT
`

// In iptables mode the same is true of what the outside and other nodes see.
func TestIPTablesMode(t *testing.T) {
	noLeak(t)
	install(t, "bpf.masquerade=false")
	for _, n := range shared.Nodes() {
		s, err := statusOf(t, n)
		if err != nil {
			t.Fatal(err)
		}
		if s.Masquerading.Mode != agent.ModeIPTables {
			t.Errorf("%s: mode %s", n.Name, s.Masquerading.Mode)
		}
	}
	t.Run("World", TestWorldSeesTheNode)
	t.Run("Cluster", TestInsideTheClusterNothingIsTranslated)
	t.Run("NodePort", TestNodePort)
}

func TestBesideIPMasqAgent(t *testing.T) {
	noLeak(t)
	install(t, "image.variant=iptables") // which can name the rules of others
	n := node(0)
	if _, err := n.Run(t.Context(), "sh", "-c", "iptables-restore --noflush <<'.'\n"+ipMasqAgentRules+".\n"); err != nil {
		t.Fatal(err)
	}
	clean := func() {
		for _, rule := range []string{
			"iptables -t nat -D POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT",
			"iptables -t nat -F IP-MASQ-AGENT", "iptables -t nat -X IP-MASQ-AGENT",
		} {
			if _, err := n.Run(t.Context(), strings.Fields(rule)...); err != nil {
				t.Error(err)
			}
		}
	}
	warned(t, n, "IP-MASQ-AGENT", true)
	TestWorldSeesTheNode(t)
	clean()
	warned(t, n, "IP-MASQ-AGENT", false)
	TestWorldSeesTheNode(t)
}
