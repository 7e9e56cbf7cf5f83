package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// modeEnv names the environment variable with the mode of all agents of a run:
// iptables-nft or iptables-legacy; without it they are in eBPF mode.
const modeEnv = "BAUTA_E2E_MODE"

// iptablesMode is the option.
const iptablesMode = "--enable-bpf-masquerade=false"

// ruleBackends are the halves of the kernel that rules are in; both are installed in CI.
var ruleBackends = []string{"nft", "legacy"}

// suiteBackend is the half of the kernel that this run's agents write rules to; empty
// in eBPF mode.
var suiteBackend string

// chooseMode reads the mode of the run.
func chooseMode() error {
	mode := os.Getenv(modeEnv)
	if mode == "" {
		return nil
	}
	backend, ok := strings.CutPrefix(mode, "iptables-")
	if !ok || !slices.Contains(ruleBackends, backend) {
		return fmt.Errorf("%s: %q is none of iptables-%s", modeEnv, mode, strings.Join(ruleBackends, ", iptables-"))
	}
	suiteBackend = backend
	return nil
}

// setsModes leaves a test out of the runs in iptables mode: it starts agents of each mode
// by itself, in the run in eBPF mode.
func setsModes(t *testing.T) {
	t.Helper()
	if suiteBackend != "" {
		t.Skipf("%s: it sets modes by itself, and runs without %s", labtest.OtherMode, modeEnv)
	}
}

// useMode makes the node one of the run's mode, or ends a test that the mode has no place for.
func (n *node) useMode(t testing.TB) {
	t.Helper()
	if suiteBackend == "" {
		return
	}
	name, _, _ := strings.Cut(t.Name(), "/")
	if why := notInIPTables[name]; why != "" {
		t.Skipf("%s: %s", labtest.OtherMode, why)
	}
	n.useBackend(suiteBackend)
}

// useBackend makes the agents of the node choose a backend, as the wrappers of distributions
// do: by the rules of others that are in it.
func (n *node) useBackend(backend string) {
	n.t.Helper()
	n.backend = backend
	for _, family := range []string{"iptables", "ip6tables"} {
		n.tables(family+"-"+backend, "-A", "INPUT", "-p", "sctp", "--dport", "1", "-j", "ACCEPT")
	}
}

// lockFile gives the node a lock of its own for rules of the legacy backend: there is one
// for all network namespaces of a machine, and so for all tests.
func (n *node) lockFile() string { return "XTABLES_LOCKFILE=" + filepath.Join(n.dir, "xtables.lock") }

// command completes a command line of the CLI. Agents are told the mode of the run; an
// option of the test, which comes later, wins.
func (n *node) command(args []string) []string {
	if suiteBackend == "" || len(args) == 0 || args[0] != "agent" {
		return slices.Clone(args)
	}
	args = slices.DeleteFunc(slices.Clone(args[1:]), func(a string) bool { return a == "--allow-private-bpffs" }) // it has no effect
	return append([]string{"agent", iptablesMode}, args...)
}

// tables runs a program of iptables in the node.
func (n *node) tables(name string, args ...string) string {
	n.t.Helper()
	out, err := n.Node.Run(within(n.t, patience), "env", append([]string{n.lockFile(), labtest.Tool(n.t, name)}, args...)...)
	if err != nil {
		n.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// inEachBackend runs a test with each backend, on a node where rules of others are in
// that one.
func inEachBackend(t *testing.T, opts lab.Options, test func(t *testing.T, n *node, backend string)) {
	t.Helper()
	setsModes(t)
	for _, backend := range ruleBackends {
		t.Run(backend, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, opts)
			n.useBackend(backend)
			test(t, n, backend)
		})
	}
}
