package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
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

// A start that stops half-way leaves nothing: one is interrupted as soon as its last
// node is started, one has no Kubernetes at all.
func TestStartThatFails(t *testing.T) {
	for _, test := range []struct {
		options cluster.Options
		want    string
	}{
		{cluster.Options{Kube: programs.Kube, Images: programs.Images}, context.Canceled.Error()},
		{cluster.Options{Kube: "/nowhere/kube", Images: programs.Images}, "start etcd"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go cancelWhenThereIs(ctx, cancel, filepath.Join(filepath.Dir(shared.Dir), fmt.Sprintf("bauta-cluster-%d-*", os.Getpid()), "node2", "init.log"))
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

// cancelWhenThereIs cancels when a file appears that the shared cluster does not have.
func cancelWhenThereIs(ctx context.Context, cancel func(), pattern string) {
	every := time.NewTicker(20 * time.Millisecond)
	defer every.Stop()
	for ctx.Err() == nil {
		<-every.C
		files, _ := filepath.Glob(pattern) // the pattern is right
		for _, f := range files {
			if !strings.HasPrefix(f, shared.Dir) {
				cancel()
			}
		}
	}
}
