package cluster_test

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/test/cluster"
)

// A node joins and leaves: the others know it, and it masquerades as they do.
func TestNodeJoinsAndLeaves(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0, 1)
	n, err := shared.AddNode(t.Context())
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
	if err := n.AwaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	knows(t, node(0), n, true)
	podsReady(t, true)
	p, err := n.StartPod(t.Context(), cluster.PodOptions{Name: "pod-" + n.Name})
	if err != nil {
		t.Fatal(err)
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
	leave()
	knows(t, node(0), n, false)
	l.unharmed(t)
}

// knows waits until a node has another's addresses in its kernel, or has not.
func knows(t *testing.T, n, other *cluster.Node, want bool) {
	t.Helper()
	labtest.Eventually(t, 10*time.Second, func() error {
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
