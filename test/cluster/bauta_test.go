package cluster_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/test/cluster"
)

var chart = flag.String("chart", "../../charts/bauta", "the chart that is installed")

// The versions of the image that every node has: the one that is installed, and
// the same program under another name to upgrade to.
const (
	version = "cluster-1"
	newer   = "cluster-2"
)

// namespace is where the release lives.
const namespace = "kube-system"

// install installs Bauta, or changes the values of what is installed, and waits
// until every agent is ready. Values are "NAME=VALUE", those of JSON "NAME:=VALUE".
func install(t testing.TB, values ...string) {
	t.Helper()
	if err := tryInstall(t.Context(), version, values...); err != nil {
		t.Fatalf("%v\n%s", err, agentLogs(t))
	}
}

func tryInstall(ctx context.Context, tag string, values ...string) error {
	args := []string{
		"upgrade", "--install", "bauta", *chart, "--namespace", namespace, "--wait", "--timeout", "90s",
		"--set", "image.repository=bauta.test/bauta", "--set", "image.pullPolicy=Never", "--set", "image.tag=" + tag,
		// Both nodes at once would hide what happens to the traffic of the others.
		"--set", "updateStrategy.rollingUpdate.maxUnavailable=1",
	}
	for _, v := range values {
		if name, value, ok := strings.Cut(v, ":="); ok {
			args = append(args, "--set-json", name+"="+value)
		} else {
			args = append(args, "--set", v)
		}
	}
	_, err := shared.Helm(ctx, args...)
	return err
}

// uninstall removes the release and waits until its pods are gone.
func uninstall(t testing.TB) {
	t.Helper()
	if _, err := shared.Helm(t.Context(), "uninstall", "bauta", "--namespace", namespace, "--wait", "--timeout", "60s"); err != nil {
		t.Fatal(err)
	}
	wait(t, time.Minute, func() error {
		if list := agents(t); len(list) > 0 {
			return fmt.Errorf("agents that are left: %v", list)
		}
		return nil
	})
}

// agents returns the name of the agent's pod on each node.
func agents(t testing.TB) map[string]string {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct {
				Name              string
				DeletionTimestamp *string
			}
			Spec struct{ NodeName string }
		}
	}
	path := "/api/v1/namespaces/" + namespace + "/pods?labelSelector=app.kubernetes.io/name%3Dbauta"
	if err := shared.API.Get(t.Context(), path, &list); err != nil {
		t.Fatal(err)
	}
	on := make(map[string]string)
	for _, p := range list.Items {
		on[p.Spec.NodeName] = p.Metadata.Name
	}
	return on
}

func agentLogs(t testing.TB) string {
	var b strings.Builder
	for node, pod := range agents(t) {
		out, err := shared.Kubectl(context.Background(), "", "logs", "-n", namespace, pod, "--tail=20")
		if err != nil {
			out = err.Error() + "\n"
		}
		fmt.Fprintf(&b, "--- agent on %s\n%s", node, out)
	}
	return b.String()
}

// bauta runs a command of Bauta in the agent's container on a node.
func bauta(t testing.TB, n *cluster.Node, args ...string) (string, error) {
	t.Helper()
	return n.Exec(t.Context(), "agent", append([]string{"/bauta"}, args...)...)
}

// statusOf is what `bauta status` says on a node.
func statusOf(t testing.TB, n *cluster.Node) (s agent.Status, err error) {
	t.Helper()
	// Exit code 3 is that of a degraded state, which a test may be about.
	out, failed := bauta(t, n, "status", "-o", "json")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("status of %s: %w, %v", n.Name, err, failed)
	}
	return s, nil
}

// noLeak fails the test if by its end another packet of a pod has reached the outside.
func noLeak(t *testing.T) {
	t.Helper()
	before, err := shared.Fabric.Leaks()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		after, err := shared.Fabric.Leaks()
		if err != nil {
			t.Error(err)
		}
		if after > before {
			t.Errorf("%d packets of pods reached the outside:\n%s", after-before, strings.Join(shared.Fabric.Leaked(), "\n"))
		}
	})
}

// node returns the node that has a number, counted from 0.
func node(i int) *cluster.Node { return shared.Nodes()[i] }

// both runs a test for each family.
func both(t *testing.T, f func(t *testing.T, of func(lab.Pair) netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { f(t, func(p lab.Pair) netip.Addr { return p.V4 }) })
	t.Run("IPv6", func(t *testing.T) { f(t, func(p lab.Pair) netip.Addr { return p.V6 }) })
}

// lines returns the lines of a text that are not empty.
func lines(text string) []string {
	return slices.DeleteFunc(strings.Split(text, "\n"), func(s string) bool { return strings.TrimSpace(s) == "" })
}

// missing returns an error that names what is not in the set.
func missing(have map[string]bool, want ...string) error {
	for _, w := range want {
		if !have[w] {
			return fmt.Errorf("%s has not answered yet", w)
		}
	}
	return nil
}

// agentPod is what the API server says of an agent's pod.
type agentPod struct {
	ready    bool
	restarts int
}

// podsReady waits until each agent's pod is ready, or is not.
func podsReady(t testing.TB, want bool) {
	t.Helper()
	wait(t, propagation, func() error {
		on := agents(t)
		for _, n := range shared.Nodes() {
			p, err := agentPodOf(t, on[n.Name])
			if err != nil {
				return err
			}
			if p.ready != want {
				return fmt.Errorf("agent on %s: ready %t, want %t", n.Name, p.ready, want)
			}
		}
		return nil
	})
}

func agentPodOf(t testing.TB, name string) (p agentPod, err error) {
	var object struct {
		Status struct {
			ContainerStatuses []struct {
				Ready        bool
				RestartCount int
			}
		}
	}
	err = shared.API.Get(t.Context(), "/api/v1/namespaces/"+namespace+"/pods/"+name, &object)
	if err == nil && len(object.Status.ContainerStatuses) != 1 {
		err = fmt.Errorf("pod %s: %d containers", name, len(object.Status.ContainerStatuses))
	}
	if err != nil {
		return p, err
	}
	c := object.Status.ContainerStatuses[0]
	return agentPod{c.Ready, c.RestartCount}, nil
}

// sameAgents fails the test unless the agents are the same pods, never restarted.
func sameAgents(t testing.TB, before map[string]string) {
	t.Helper()
	for n, name := range agents(t) {
		p, err := agentPodOf(t, name)
		if err != nil {
			t.Error(err)
		}
		if name != before[n] || p.restarts > 0 {
			t.Errorf("agent on %s: pod %s with %d restarts, it was %s", n, name, p.restarts, before[n])
		}
	}
}

// wait is labtest.Eventually for questions that cost something: a process in a
// container, a request to the API server.
func wait(t testing.TB, limit time.Duration, cond func() error) {
	t.Helper()
	deadline := time.Now().Add(labtest.Patience(limit))
	every := time.NewTicker(200 * time.Millisecond)
	defer every.Stop()
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %v", limit, err)
		}
		<-every.C
	}
}
