package cluster_test

import "testing"

func TestNodesAreReady(t *testing.T) {
	for _, n := range shared.Nodes() {
		if err := n.AwaitReady(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
