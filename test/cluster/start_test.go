package cluster_test

import (
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
)

func TestNodesAreReady(t *testing.T) {
	for _, n := range shared.Nodes() {
		if err := n.AwaitReady(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

var logsIn = regexp.MustCompile(`logs are in (\S+)`)

// A start that stops half-way leaves nothing: it is interrupted while its nodes are
// started, and it has no Kubernetes at all.
func TestStartThatFails(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	for _, test := range []struct {
		options cluster.Options
		want    string
	}{
		{cluster.Options{Kube: programs.Kube, Images: programs.Images}, context.DeadlineExceeded.Error()},
		{cluster.Options{Kube: "/nowhere/kube", Images: programs.Images}, "start etcd"},
	} {
		before, err := cluster.Look()
		if err != nil {
			t.Fatal(err)
		}
		c, err := cluster.Start(ctx, test.options)
		if err == nil {
			c.Close(false)
			t.Fatal("a cluster has started")
		}
		if !strings.Contains(err.Error(), test.want) {
			t.Errorf("error %v, want one of %s", err, test.want)
		}
		if changes := before.Unchanged(); changes != nil {
			t.Error(changes)
		}
		if dir := logsIn.FindStringSubmatch(err.Error()); dir == nil {
			t.Errorf("error %v: does not say where the logs are", err)
		} else if err := os.RemoveAll(dir[1]); err != nil {
			t.Error(err)
		}
	}
}
