package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
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

// runIPMasqAgent writes the rules of ip-masq-agent on a node, until remove is called
// or the test ends.
func runIPMasqAgent(t *testing.T, n *cluster.Node) (remove func()) {
	t.Helper()
	runLines(t, n, "iptables-restore --noflush <<'.'\n"+ipMasqAgentRules+".\n")
	remove = sync.OnceFunc(func() {
		runLines(t, n, `
iptables -t nat -S IP-MASQ-AGENT >/dev/null 2>&1 || exit 0
iptables -t nat -D POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
iptables -t nat -F IP-MASQ-AGENT
iptables -t nat -X IP-MASQ-AGENT`)
	})
	t.Cleanup(remove)
	return remove
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
	removeRules := runIPMasqAgent(t, other)

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

// A cluster that ip-masq-agent masquerades changes to Bauta under load: no connection
// breaks, and the rules are gone.
func TestTakeOverFromIPMasqAgent(t *testing.T) {
	noLeak(t)
	install(t)
	uninstall(t)
	cleanUp(t)
	var l load
	for i, n := range shared.Nodes() {
		runIPMasqAgent(t, n)
		l = append(l, hold(t, podOn[i], netip.AddrPortFrom(cluster.World.V4, cluster.EchoPort), n.Addr.V4))
	}
	l.alive(t)
	install(t, "takeOver=IP-MASQ-AGENT")
	for _, n := range shared.Nodes() {
		wait(t, time.Minute, func() error {
			rules, err := n.Run(t.Context(), "iptables-save", "-t", "nat")
			if err == nil && strings.Contains(rules, "IP-MASQ-AGENT") {
				err = fmt.Errorf("%s still has the rules of ip-masq-agent:\n%s", n.Name, rules)
			}
			return err
		})
	}
	l.alive(t)
	install(t) // what is taken over need not be named any more
	l.unharmed(t)
}
