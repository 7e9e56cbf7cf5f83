package cluster

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
)

// Container returns the identity of the running container of the name, which only
// one pod of the node may have. It does not ask the API server.
func (n *Node) Container(ctx context.Context, name string) (string, error) {
	named, err := n.ctr(ctx, "containers", "list", "--quiet", fmt.Sprintf(`labels."io.kubernetes.container.name"==%s`, name))
	if err != nil {
		return "", err
	}
	tasks, err := n.ctr(ctx, "tasks", "list")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(tasks) { // identity, PID, state
		if f := strings.Fields(line); len(f) == 3 && f[2] == "RUNNING" && strings.Contains(named, f[0]) {
			return f[0], nil
		}
	}
	return "", fmt.Errorf("container %s on %s: none runs", name, n.Name)
}

var execs atomic.Uint64

// Exec runs a command in a running container and returns what it wrote to its
// standard output.
func (n *Node) Exec(ctx context.Context, container string, argv ...string) (string, error) {
	id, err := n.Container(ctx, container)
	if err != nil {
		return "", err
	}
	exec := "test-" + strconv.FormatUint(execs.Add(1), 10)
	return n.ctr(ctx, append([]string{"tasks", "exec", "--exec-id", exec, id}, argv...)...)
}

// Kill kills a running container's first process: nobody asks it to end.
func (n *Node) Kill(ctx context.Context, container string) error {
	id, err := n.Container(ctx, container)
	if err != nil {
		return err
	}
	_, err = n.ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id)
	return err
}

func (n *Node) ctr(ctx context.Context, args ...string) (string, error) {
	return n.Run(ctx, append([]string{"ctr", "--namespace", "k8s.io"}, args...)...)
}

// CNIMasquerades has the CNI plugin translate what pods send that are started from
// now on (its option ipMasq), or not any more.
func (n *Node) CNIMasquerades(on bool) error {
	return n.spec.writeCNI(n.cluster.opts.CNI, n.Pods, on)
}
