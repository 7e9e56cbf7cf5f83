package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/test/cluster"
)

// propagation is how long the kubelets may take to bring a ConfigMap into a pod.
const propagation = 30 * time.Second

// defaults is the list without a ConfigMap, as `bauta bpf ipmasq list` prints it.
var defaults = []string{
	"10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24",
	"192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4", "fe80::/10",
}

// ipMasq is a ConfigMap as users of ip-masq-agent have it.
func ipMasq(name, config string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: %s}\ndata:\n  config: |\n    %s\n",
		name, namespace, strings.ReplaceAll(strings.TrimSpace(config), "\n", "\n    "))
}

// private is the list of RFC 1918, with both switches set to link.
func private(link bool) string {
	return fmt.Sprintf("nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- 172.16.0.0/12\n- 192.168.0.0/16\nmasqLinkLocal: %[1]t\nmasqLinkLocalIPv6: %[1]t\n", link)
}

// listed waits until the list of every node is the wanted one.
func listed(t *testing.T, want ...string) {
	t.Helper()
	for _, n := range shared.Nodes() {
		wait(t, propagation, func() error {
			out, err := bauta(t, n, "bpf", "ipmasq", "list")
			if err != nil {
				return err
			}
			got := lines(out)
			if len(got) == 0 || got[0] != "IP PREFIX/ADDRESS" || !slices.Equal(got[1:], want) {
				return fmt.Errorf("%s lists %q, want %q", n.Name, got, want)
			}
			return nil
		})
	}
}

// sees fails unless the outside's address sees the wanted source of a pod.
func sees(t *testing.T, to, want lab.Pair) {
	t.Helper()
	for _, a := range to.All() {
		if got := ask(t, podOn[0], "tcp", echo(a, "tcp")).Source.Addr(); got != want.Of(a) {
			t.Errorf("%s saw %s, want %s", a, got, want.Of(a))
		}
	}
}

func deleteConfigMap(t *testing.T, name string) {
	t.Helper()
	if err := shared.API.Delete(context.WithoutCancel(t.Context()), "/api/v1/namespaces/"+namespace+"/configmaps/"+name); err != nil {
		t.Error(err)
	}
}

// hasEvent waits for an Event about a node, with a reason and a word in its message.
func hasEvent(t *testing.T, n *cluster.Node, reason, word string) {
	t.Helper()
	wait(t, 30*time.Second, func() error {
		var list struct {
			Items []struct{ Reason, Message, Type string }
		}
		path := "/api/v1/events?fieldSelector=involvedObject.kind%3DNode,involvedObject.name%3D" + n.Name
		if err := shared.API.Get(t.Context(), path, &list); err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Reason == reason && strings.Contains(e.Message, word) {
				return nil
			}
		}
		return fmt.Errorf("%s has no Event %s about %s: %+v", n.Name, reason, word, list.Items)
	})
}

func apply(t *testing.T, objects string) {
	t.Helper()
	if err := shared.Apply(t.Context(), objects); err != nil {
		t.Fatal(err)
	}
}

// The life of an ip-masq-agent ConfigMap, without a restart of any agent.
func TestIPMasqAgentConfigMap(t *testing.T) {
	noLeak(t)
	install(t, "ipMasqAgent.enabled=true", `ipMasqAgent.fragments:=["ip-masq-cloud"]`)
	t.Cleanup(func() {
		deleteConfigMap(t, "ip-masq-agent")
		deleteConfigMap(t, "ip-masq-cloud")
	})
	before := agents(t)
	friend4 := lab.Pair{V4: cluster.Friend.V4, V6: cluster.Friend.V4}

	listed(t, defaults...)
	sees(t, friend4, podOn[0].Addr)

	// Created after the agent: the list of the issue, exactly.
	apply(t, ipMasq("ip-masq-agent", private(true)))
	listed(t, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
	sees(t, friend4, node(0).Addr)
	private4 := lab.Pair{V4: cluster.Private.V4, V6: cluster.Private.V4}
	sees(t, private4, podOn[0].Addr)

	apply(t, ipMasq("ip-masq-agent", private(false)))
	listed(t, "10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", "fe80::/10")

	// A second fragment is merged, and the status tells which is which.
	apply(t, ipMasq("ip-masq-cloud", "nonMasqueradeCIDRs: [198.51.100.0/24, 2001:db8:99::20/128]\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true"))
	merged := []string{"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.51.100.0/24", "2001:db8:99::20/128"}
	listed(t, merged...)
	sees(t, cluster.Friend, podOn[0].Addr)
	s, err := statusOf(t, node(0))
	if err != nil {
		t.Fatal(err)
	}
	for prefix, file := range map[string]string{"10.0.0.0/8": "ip-masq-agent", "198.51.100.0/24": "ip-masq-cloud"} {
		found := false
		for _, r := range s.IPMasqAgent.Rules {
			found = found || r.Prefix == netip.MustParsePrefix(prefix) && strings.HasSuffix(r.Origin, "/"+file)
		}
		if !found {
			t.Errorf("status does not say that %s comes from %s: %+v", prefix, file, s.IPMasqAgent.Rules)
		}
	}

	// Made invalid: the last good state, not ready.
	apply(t, ipMasq("ip-masq-cloud", "nonMasqueradeCIDRs: [198.51.100.0/33]"))
	podsReady(t, false)
	for _, n := range shared.Nodes() {
		hasEvent(t, n, "ConfigInvalid", "ip-masq-cloud")
	}
	listed(t, merged...)
	sees(t, cluster.Friend, podOn[0].Addr)

	apply(t, ipMasq("ip-masq-cloud", "nonMasqueradeCIDRs: [198.51.100.20/32]\nmasqLinkLocal: true\nmasqLinkLocalIPv6: true"))
	podsReady(t, true)
	listed(t, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "198.51.100.20/32")

	deleteConfigMap(t, "ip-masq-agent")
	deleteConfigMap(t, "ip-masq-cloud")
	listed(t, defaults...)

	sameAgents(t, before)
}
