package cluster_test

import (
	"fmt"
	"testing"
	"time"

	"bauta.dev/bauta/test/cluster"
)

// restarted waits until the agent of a node is ready after more restarts than before.
func restarted(t *testing.T, n *cluster.Node, before int) {
	t.Helper()
	wait(t, time.Minute, func() error {
		p, err := agentPodOf(t, agents(t)[n.Name])
		if err == nil && (!p.ready || p.restarts <= before) {
			err = fmt.Errorf("agent on %s: ready %t, %d restarts", n.Name, p.ready, p.restarts)
		}
		return err
	})
}

// versions waits until every agent that runs is of the version.
func versions(t *testing.T, want string) {
	t.Helper()
	for _, n := range shared.Nodes() {
		wait(t, 30*time.Second, func() error {
			s, err := statusOf(t, n)
			if err == nil && s.Agent.Version != want {
				err = fmt.Errorf("agent on %s: version %s, want %s", n.Name, s.Agent.Version, want)
			}
			return err
		})
	}
}

func TestAgentKilled(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0, 1)
	for _, n := range shared.Nodes() {
		p, err := agentPodOf(t, agents(t)[n.Name])
		if err != nil {
			t.Fatal(err)
		}
		if err := n.Kill(t.Context(), "agent"); err != nil {
			t.Fatal(err)
		}
		l.alive(t)
		restarted(t, n, p.restarts)
	}
	l.unharmed(t)
}

func TestAgentsRolled(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0, 1)
	before := agents(t)
	for _, args := range [][]string{
		{"rollout", "restart", "daemonset/bauta", "-n", namespace},
		{"rollout", "status", "daemonset/bauta", "-n", namespace, "--timeout=90s"},
	} {
		if _, err := shared.Kubectl(t.Context(), "", args...); err != nil {
			t.Fatal(err)
		}
	}
	for n, pod := range agents(t) {
		if before[n] == pod {
			t.Errorf("agent on %s: still pod %s", n, pod)
		}
	}
	l.unharmed(t)
}

// An upgrade with helm, another image, and back.
func TestUpgradeAndRollback(t *testing.T) {
	noLeak(t)
	install(t)
	versions(t, version)
	l := startLoad(t, 0, 1)
	if err := tryInstall(t.Context(), newer); err != nil {
		t.Fatalf("%v\n%s", err, agentLogs(t))
	}
	versions(t, newer)
	l.alive(t)
	if _, err := shared.Helm(t.Context(), "rollback", "bauta", "--namespace", namespace, "--wait", "--timeout", "90s"); err != nil {
		t.Fatalf("%v\n%s", err, agentLogs(t))
	}
	versions(t, version)
	l.unharmed(t)
}

// A node that loses power: the others do not notice, and it masquerades again.
func TestNodeRebooted(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0)
	n := node(1)
	before, err := agentPodOf(t, agents(t)[n.Name])
	if err != nil {
		t.Fatal(err)
	}
	if err := n.PowerOff(); err != nil {
		t.Fatal(err)
	}
	l.alive(t)
	if err := n.Boot(); err != nil {
		t.Fatal(err)
	}
	restarted(t, n, before.restarts)
	// Its pods have other addresses, in new namespaces.
	for _, p := range []*cluster.Pod{podOn[1], hostOn[1]} {
		wait(t, time.Minute, func() error {
			if err := p.AwaitReady(t.Context()); err != nil {
				return err
			}
			for _, a := range cluster.World.All() {
				seen, err := p.Ask(t.Context(), "tcp", echo(a, "tcp"))
				if err == nil && seen.Source.Addr() != n.Addr.Of(a) {
					err = fmt.Errorf("%s saw %s, want %s", a, seen.Source, n.Addr.Of(a))
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	l.unharmed(t)
}

// The API server is cut off, an agent restarts meanwhile, and it comes back.
func TestAPIServerAway(t *testing.T) {
	noLeak(t)
	install(t)
	l := startLoad(t, 0, 1)
	if err := shared.CutAPI(true); err != nil {
		t.Fatal(err)
	}
	back := func() {
		if err := shared.CutAPI(false); err != nil {
			t.Error(err)
		}
	}
	defer back()
	wait(t, time.Minute, func() error {
		s, err := statusOf(t, node(0))
		if err == nil && (s.Kubernetes == nil || s.Kubernetes.Error == "") {
			err = fmt.Errorf("status does not say that the API server is away")
		}
		return err
	})
	first, err := node(0).Container(t.Context(), "agent")
	if err != nil {
		t.Fatal(err)
	}
	if err := node(0).Kill(t.Context(), "agent"); err != nil {
		t.Fatal(err)
	}
	// The new one knows other nodes from its last run, and its health does not
	// depend on the API server.
	wait(t, time.Minute, func() error {
		id, err := node(0).Container(t.Context(), "agent")
		if err != nil {
			return err
		}
		if id == first {
			return fmt.Errorf("the kubelet has not started another one")
		}
		s, err := statusOf(t, node(0))
		if err == nil && (!s.Agent.Ready || s.Kubernetes == nil || s.Kubernetes.Synced) {
			err = fmt.Errorf("ready %t, Kubernetes %+v", s.Agent.Ready, s.Kubernetes)
		}
		return err
	})
	l.alive(t)
	TestWorldSeesTheNode(t)

	back()
	for _, n := range shared.Nodes() {
		if err := n.AwaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		wait(t, time.Minute, func() error {
			s, err := statusOf(t, n)
			if err == nil && (s.Kubernetes == nil || !s.Kubernetes.Synced || s.Kubernetes.Error != "") {
				err = fmt.Errorf("%s: Kubernetes %+v", n.Name, s.Kubernetes)
			}
			return err
		})
	}
	podsReady(t, true)
	l.unharmed(t)
}
