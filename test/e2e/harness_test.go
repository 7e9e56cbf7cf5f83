package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// podCIDRs is the option with the pods of the standard topology.
var podCIDRs = "--pod-cidrs=" + lab.PodRange4.String() + "," + lab.PodRange6.String()

// node is the node of a topology, with the files of its agent.
type node struct {
	*lab.Topology
	t       testing.TB
	dir     string // for files of the test, such as the ip-masq-agent file
	bpfRoot string
	runDir  string
	bin     string   // what start and CLI run
	env     []string // of the agent, added to that of the test
	noTCX   bool     // the agent finds a kernel without tcx
	backend string   // of the rules of its agents; empty: they are in eBPF mode
	agent   *process // the running one, or the last
	log     logBuffer
}

// newNode builds a topology; no agent runs in it yet. At the end of the test its
// agent is killed, and its log is shown if the test failed.
func newNode(t testing.TB, opts lab.Options) *node {
	t.Helper()
	n := &node{Topology: labtest.NewNode(t, opts), t: t, dir: t.TempDir(), bin: bautaBin}
	n.bpfRoot = filepath.Join(labtest.BPFFS(t), "bauta")
	n.runDir = filepath.Join(n.dir, "run")
	n.useMode(t)
	t.Cleanup(func() {
		if n.agent != nil {
			n.agent.kill()
			n.removeLock()
		}
		if t.Failed() && n.log.Len() > 0 {
			t.Logf("agent's log:\n%s", n.log.String())
		}
	})
	return n
}

// removeLock removes what a killed agent leaves of its lock on the rules. A node uses it again, but
// this one is about to go.
func (n *node) removeLock() {
	var ns unix.Stat_t
	err := n.Node.Do(func() error { return unix.Stat("/proc/thread-self/ns/net", &ns) })
	if err != nil {
		n.t.Errorf("network namespace: %v", err)
	}
	os.Remove(filepath.Join(agent.DefaultRunDir, fmt.Sprintf("iptables-%d.lock", ns.Ino)))
	os.Remove(agent.DefaultRunDir) // if nothing else is there
}

// startNode builds a topology and starts an agent for its pods.
func startNode(t testing.TB, opts lab.Options, args ...string) *node {
	t.Helper()
	n := newNode(t, opts)
	n.start(append([]string{podCIDRs}, args...)...)
	return n
}

// launch starts an agent and does not wait for anything.
func (n *node) launch(args ...string) {
	n.t.Helper()
	if n.agent != nil && !n.agent.ended() {
		n.t.Fatal("an agent still runs")
	}
	all := n.command(append([]string{"agent", "--bpf-root", n.bpfRoot, "--run-dir", n.runDir, "--allow-private-bpffs"}, args...))
	fmt.Fprintf(&n.log, "$ bauta %s\n", strings.Join(all, " "))
	cmd := exec.Command(n.bin, all...)
	cmd.Env = append(append(os.Environ(), n.lockFile()), n.env...)
	if n.noTCX {
		cmd.Path = "/proc/self/exe"
		cmd.Env = append(cmd.Env, withoutTCX+"="+n.bin)
	}
	cmd.Stdout, cmd.Stderr = &n.log, &n.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := startIn(n.Node, cmd); err != nil {
		n.t.Fatalf("start the agent: %v", err)
	}
	n.agent = watch(cmd, args)
}

// start starts an agent and waits until it has applied its policy.
func (n *node) start(args ...string) {
	n.t.Helper()
	n.launch(args...)
	n.waitReady()
}

// waitReady waits until the agent that was started has applied its policy.
func (n *node) waitReady() {
	n.t.Helper()
	labtest.Eventually(n.t, 30*time.Second, func() error {
		if n.agent.ended() {
			n.t.Fatalf("agent ended: %v", n.agent.err)
		}
		if _, err := os.Stat(filepath.Join(n.runDir, "agent.sock")); err != nil {
			return err // without it the status is what others left, and looking that up takes long
		}
		st, err := n.readStatus()
		switch {
		case err != nil:
			return err
		case st.Agent.State != agent.Running || st.Agent.PID != n.agent.cmd.Process.Pid:
			return fmt.Errorf("agent: %s, pid %d", st.Agent.State, st.Agent.PID)
		case !st.Agent.Ready:
			return fmt.Errorf("agent is not ready: %s", st.Agent.Error)
		case suiteBackend != "" && st.Masquerading.Enabled && st.Datapath.Tier != "iptables-"+suiteBackend:
			n.t.Fatalf("the agent works with %s, in a run with %s", st.Datapath.Tier, suiteBackend)
		}
		return nil
	})
}

// kill ends the agent as a crash does.
func (n *node) kill() {
	n.t.Helper()
	if n.agent.ended() {
		n.t.Fatalf("agent had ended before: %v", n.agent.err)
	}
	n.agent.kill()
}

// stop ends the agent as a service manager does, and expects that it ends well.
func (n *node) stop() {
	n.t.Helper()
	if n.agent.ended() {
		n.t.Fatalf("agent had ended before: %v", n.agent.err)
	}
	n.agent.cmd.Process.Signal(syscall.SIGTERM)
	if err := n.agent.wait(n.t, 10*time.Second); err != nil {
		n.t.Fatalf("agent after SIGTERM: %v", err)
	}
}

// restart stops the agent and starts it again, with the options it had and those
// given: a later one of the same name wins.
func (n *node) restart(args ...string) {
	n.t.Helper()
	n.stop()
	n.start(slices.Concat(n.agent.args, args)...)
}

// result is what a command of the CLI did.
type result struct {
	stdout, stderr string
	code           int
}

// try runs a command of the CLI in the node.
func (n *node) try(args ...string) result {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.bin, append(n.command(args), "--bpf-root", n.bpfRoot, "--run-dir", n.runDir)...)
	cmd.Env = append(os.Environ(), n.lockFile())
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := n.Node.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		n.t.Fatalf("bauta %s: %v", strings.Join(args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// cli runs a command of the CLI that must succeed, and returns its output.
func (n *node) cli(args ...string) string {
	n.t.Helper()
	r := n.try(args...)
	if r.code != 0 {
		n.t.Fatalf("bauta %s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// cliJSON runs a command of the CLI with -o json and decodes what it printed.
// Exit status 3 (degraded) is fine.
func (n *node) cliJSON(v any, args ...string) {
	n.t.Helper()
	args = append(slices.Clone(args), "-o", "json")
	r := n.try(args...)
	if r.code != 0 && r.code != 3 {
		n.t.Fatalf("bauta %s: exit status %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	if err := json.Unmarshal([]byte(r.stdout), v); err != nil {
		n.t.Fatalf("bauta %s: %v\n%s", strings.Join(args, " "), err, r.stdout)
	}
}

// status is what `bauta status -o json` says, with an agent or without.
func (n *node) status() (st agent.Status) {
	n.t.Helper()
	n.cliJSON(&st, "status")
	return st
}

// write replaces a file of the test as the kubelet does, by a rename, and
// returns its path.
func (n *node) write(name, content string) string {
	n.t.Helper()
	path := filepath.Join(n.dir, name)
	tmp := filepath.Join(n.dir, "."+name+".new")
	if err := os.WriteFile(tmp, []byte(content), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		n.t.Fatal(err)
	}
	return path
}

// writeList writes an ip-masq-agent file with these prefixes.
func (n *node) writeList(prefixes ...string) (path string) {
	n.t.Helper()
	var b strings.Builder
	b.WriteString("nonMasqueradeCIDRs:\n")
	for _, p := range prefixes {
		fmt.Fprintf(&b, "- %s\n", p)
	}
	return n.write("ip-masq-agent", b.String())
}

// process is an agent, running or ended.
type process struct {
	cmd  *exec.Cmd
	args []string
	done chan struct{}
	err  error // why it ended
}

func watch(cmd *exec.Cmd, args []string) *process {
	p := &process{cmd: cmd, args: args, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// wait waits until the process has ended and returns its error.
func (p *process) wait(t testing.TB, limit time.Duration) error {
	t.Helper()
	select {
	case <-p.done:
		return p.err
	case <-time.After(limit):
		t.Fatalf("agent still runs after %v", limit)
		return nil
	}
}

// logBuffer is written by the agent and read by the test.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Len()
}
