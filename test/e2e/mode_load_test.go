package e2e_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
)

const bpfMode = "--enable-bpf-masquerade=true"

// changes are the modes that a test goes through, from eBPF mode on.
var changes = []struct{ option, mode, old string }{
	{iptablesMode, agent.ModeIPTables, agent.ModeBPF},
	{bpfMode, agent.ModeBPF, agent.ModeIPTables},
}

// ofMode tells what of a listing is of a mode.
func ofMode(listing, mode string) (lines []string) {
	pins := false
	for line := range strings.Lines(listing) {
		if strings.HasPrefix(line, "$ ") {
			pins = line == "$ pins\n"
		}
		isBPF := pins && !strings.HasPrefix(line, "$ ") || strings.Contains(line, "bauta_") || strings.Contains(line, "clsact") ||
			strings.Contains(line, " programs") && !strings.Contains(line, ": 0 programs")
		isRules := strings.Contains(line, "BAUTA-") || strings.Contains(line, "bauta-")
		if mode == agent.ModeBPF && isBPF || mode == agent.ModeIPTables && isRules {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// A restart with the other option, in both directions, under 200 connections that are never silent
// for long, flows without a handshake, and while pods connect all the time: nothing breaks,
// nothing leaks, and of the old mode nothing is left.
func TestModeChangeUnderLoad(t *testing.T) {
	inEachBackend(t, lab.Options{Pods: 2}, func(t *testing.T, n *node, _ string) {
		before := n.everything()
		n.start(podCIDRs)
		c := keepCompany(t, n, 200)
		for _, change := range slices.Concat(changes, changes) {
			n.restart(change.option)
			c.goesOn("with " + change.option)
			n.awaitNothingOf(change.old)
			c.goesOn("without " + change.old)
			now := n.everything()
			if left := ofMode(now, change.old); len(left) > 0 {
				t.Errorf("in %s mode, left of %s mode:\n%s", change.mode, change.old, strings.Join(left, "\n"))
			}
			if len(ofMode(now, change.mode)) == 0 {
				t.Errorf("the listing does not show %s mode: it proves nothing", change.mode)
			}
		}
		c.check()
		for _, change := range changes {
			n.restart(change.option)
			n.awaitNothingOf(change.old)
			n.stop()
			n.cli("cleanup")
			if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.everything(), "\n")); diff != "" {
				t.Errorf("after cleanup in %s mode (-before +after):\n%s", change.mode, diff)
			}
			n.start(n.agent.args...)
		}
	})
}

// The agent may die at any moment of a change, and the next one may be of either mode.
func TestModeChangeKilled(t *testing.T) {
	steps := map[string][]string{
		agent.ModeIPTables: {"netfilter's packets pass", "programs have their policy", "netfilter tracks", "connections moved",
			"netfilter knows the rest", "rules have new", "programs take nothing new", "mode changed"},
		agent.ModeBPF: {"let netfilter's packets pass", "programs are there", "ports of netfilter", "programs have new",
			"programs know", "mode changed"},
	}
	inEachBackend(t, lab.Options{Pods: 2}, func(t *testing.T, n *node, _ string) {
		n.start(podCIDRs, "--log-level=debug")
		c := keepCompany(t, n, 60)
		to := changes[0]
		for round := 0; len(steps[agent.ModeIPTables])+len(steps[agent.ModeBPF]) > 0; round++ {
			next, step := to, "nothing"
			n.stop()
			if list := steps[to.mode]; len(list) > 0 {
				step, steps[to.mode] = list[0], list[1:]
				since := n.log.Len()
				n.launch(slices.Concat(n.agent.args, []string{to.option})...)
				n.killAt(since, step)
				c.goesOn("killed at " + step)
				if round%2 == 1 && step != "mode changed" { // the old mode goes on
					next = changes[1-slices.Index(changes, to)]
				}
			}
			n.start(slices.Concat(n.agent.args, []string{next.option})...)
			c.goesOn("after " + step + ", with " + next.option)
			n.awaitNothingOf(next.old)
			c.goesOn("without " + next.old)
			to = changes[1-slices.Index(changes, next)]
			if left := ofMode(n.everything(), next.old); len(left) > 0 {
				t.Errorf("killed at %q, left of %s mode:\n%s", step, next.old, strings.Join(left, "\n"))
			}
		}
		c.check()
	})
}

// What can't be moved from the programs drains there: a connection of the node that met a mapping, and
// that mapping, which to netfilter were one.
func TestModeChangeDrainsPrograms(t *testing.T) {
	setsModes(t)
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.env = append(n.env, n.lockFile())
	n.start(podCIDRs)
	echo := server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4))
	pod, _ := n.talk(0, echo, 40001)
	seen, conn, err := lab.AskTCP(within(t, patience), n.Node, netip.AddrPortFrom(n.NodeAddr.V4, 40001), echo)
	must(t, err)
	defer conn.Close()
	if seen.Port() == 40001 {
		t.Fatal("the node's connection has the port of the pod's")
	}
	draining := func() {
		t.Helper()
		n.await("a connection that drains", func(st agent.Status) bool {
			return st.Draining != nil && st.Draining.Mode == agent.ModeBPF && st.Draining.Connections == 2
		})
		if out := n.try("status").stdout; !strings.Contains(out, "draining 2 ") {
			t.Error(out)
		}
		if !answers(pod) || !answers(conn) {
			t.Error("a connection does not answer")
		}
	}
	n.restart(iptablesMode, "--drain-timeout=1h")
	draining()
	n.wantDraining(0, 40001, echo, agent.ModeBPF, 40001)
	n.kill()
	n.wantDraining(0, 40001, echo, agent.ModeBPF, 40001)
	if !answers(pod) || !answers(conn) {
		t.Error("a connection does not answer without the agent")
	}
	n.start(n.agent.args...)
	draining()
	n.restart("--drain-timeout=1s")
	n.awaitNothingOf(agent.ModeBPF)
	if left := ofMode(n.everything(), agent.ModeBPF); len(left) > 0 {
		t.Errorf("left of eBPF mode:\n%s", strings.Join(left, "\n"))
	}
}
