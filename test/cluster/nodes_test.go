package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
)

// startupTaint keeps pods away from a node until its agent is ready.
const startupTaint = "node.bauta.dev/agent-not-ready"

// A node joins and leaves: the others know it, and it masquerades as they do, from
// the first packet of the first pod on.
func TestNodeJoinsAndLeaves(t *testing.T) {
	noLeak(t)
	install(t, "startupTaint.enabled=true")
	l := startLoad(t, 0, 1)
	n, err := shared.AddNode(t.Context(), startupTaint)
	if err != nil {
		t.Fatal(err)
	}
	left := false
	leave := func() {
		if left {
			return
		}
		left = true
		if err := shared.RemoveNode(context.WithoutCancel(t.Context()), n); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(leave)
	if taints, err := n.Taints(t.Context()); err != nil || !slices.Contains(taints, startupTaint) {
		t.Fatalf("the new node has the taints %q: %v", taints, err)
	}
	if err := n.AwaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := n.StartPod(t.Context(), cluster.PodOptions{Name: "pod-" + n.Name, Scheduled: true})
	if err != nil {
		t.Fatal(err)
	}
	if taints, err := n.Taints(t.Context()); err != nil || slices.Contains(taints, startupTaint) {
		t.Errorf("a pod runs, with the taints %q: %v", taints, err)
	}
	for _, a := range cluster.World.All() {
		if got := ask(t, p, "tcp", echo(a, "tcp")); got.Source.Addr() != n.Addr.Of(a) {
			t.Errorf("%s saw %s, want the new node %s", a, got.Source, n.Addr.Of(a))
		}
	}
	for _, pair := range [][2]*cluster.Pod{{p, podOn[0]}, {podOn[0], p}} {
		for _, a := range pair[1].Addr.All() {
			got := ask(t, pair[0], "tcp", netip.AddrPortFrom(a, pair[1].Port))
			if got.Source.Addr() != pair[0].Addr.Of(a) {
				t.Errorf("%s saw %s, want the pod %s", a, got.Source, pair[0].Addr.Of(a))
			}
		}
	}
	podsReady(t, true)
	knows(t, node(0), n, true)
	leave()
	knows(t, node(0), n, false)
	l.unharmed(t)
}

// knows waits until a node has another's addresses in its kernel, or has not.
func knows(t *testing.T, n, other *cluster.Node, want bool) {
	t.Helper()
	wait(t, 10*time.Second, func() error {
		out, err := bauta(t, n, "bpf", "node", "list")
		if err != nil {
			return err
		}
		for _, a := range other.Addr.All() {
			if strings.Contains(out, a.String()+" ") != want {
				return fmt.Errorf("%s is to know %s: %t; it lists\n%s", n.Name, a, want, out)
			}
		}
		return nil
	})
}
