package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
)

// warned waits until the status of a node has a warning with the word, or has none.
func warned(t *testing.T, n *cluster.Node, word string, want bool) {
	t.Helper()
	wait(t, 90*time.Second, func() error {
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

// runLines runs commands on a node, one a line.
func runLines(t *testing.T, n *cluster.Node, commands string) {
	t.Helper()
	if _, err := n.Run(context.WithoutCancel(t.Context()), "sh", "-ec", commands); err != nil {
		t.Fatal(err)
	}
}

// Beside a CNI plugin with ipMasq on one node, and kubernetes-sigs/ip-masq-agent on
// the other: both translate before Bauta sees a packet. The outside sees the node
// all the same, and the status names the rules, for as long as they are there.
func TestBesideOthers(t *testing.T) {
	noLeak(t)
	install(t, "image.variant=iptables") // which can read the rules of others
	plugin, other := node(0), node(1)
	if err := plugin.CNIMasquerades(true); err != nil {
		t.Fatal(err)
	}
	// The plugin removes its rules only while it is told to make them.
	t.Cleanup(func() {
		if err := plugin.CNIMasquerades(false); err != nil {
			t.Error(err)
		}
	})
	p, err := plugin.StartPod(t.Context(), cluster.PodOptions{Name: "masqueraded"})
	if err != nil {
		t.Fatal(err)
	}
	removePod := sync.OnceFunc(func() {
		if err := p.Delete(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(removePod)
	runLines(t, other, "iptables-restore --noflush <<'.'\n"+ipMasqAgentRules+".\n")
	removeRules := sync.OnceFunc(func() {
		runLines(t, other, `
iptables -t nat -D POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
iptables -t nat -F IP-MASQ-AGENT
iptables -t nat -X IP-MASQ-AGENT`)
	})
	t.Cleanup(removeRules)

	warned(t, plugin, "CNI-", true)
	warned(t, other, "IP-MASQ-AGENT", true)
	for _, a := range cluster.World.All() {
		if got := ask(t, p, "tcp", echo(a, "tcp")); got.Source.Addr() != plugin.Addr.Of(a) {
			t.Errorf("%s saw %s, want the node %s", a, got.Source, plugin.Addr.Of(a))
		}
	}
	t.Run("World", TestWorldSeesTheNode)

	removePod()
	removeRules()
	warned(t, plugin, "CNI-", false)
	warned(t, other, "IP-MASQ-AGENT", false)
	t.Run("World again", TestWorldSeesTheNode)
}
