package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// footprint is what a data plane leaves on devices, as ip, tc and the kernel tell.
func (n *node) footprint() string {
	n.t.Helper()
	var out strings.Builder
	if n.backend != "" {
		out.WriteString(n.ownThings())
	}
	for _, command := range []string{"ip -o link show", "tc qdisc show", "tc filter show dev eth0 ingress", "tc filter show dev eth0 egress",
		"sysctl -a --pattern ^net\\.(ipv4|ipv6|core)\\."} {
		args := strings.Fields(command)
		text, err := n.Node.Run(within(n.t, patience), labtest.Tool(n.t, args[0]), args[1:]...)
		if err != nil {
			n.t.Fatalf("%s: %v\n%s", command, err, text)
		}
		// The kernel gives a device without a queue length one with its first qdisc.
		out.WriteString("$ " + command + "\n" + regexp.MustCompile(`(?:qlen \d+)?\\`).ReplaceAllString(text, `\`))
	}
	eth0, err := n.Node.Index("eth0")
	must(n.t, err)
	err = n.Node.Do(func() error {
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			programs, err := link.QueryPrograms(link.QueryOptions{Target: eth0, Attach: at})
			if err != nil {
				return err
			}
			fmt.Fprintf(&out, "%s: %d programs\n", at, len(programs.Programs))
		}
		return nil
	})
	must(n.t, err)
	return out.String()
}

// cleanup takes away all there is, only then, and twice without harm.
func TestCleanup(t *testing.T) {
	t.Parallel()
	for _, hook := range hooks() {
		t.Run(hookName(hook), func(t *testing.T) {
			n := newNode(t, lab.Options{})
			n.noTCX = hook == datapath.HookTC
			before := n.footprint()
			if out := n.cli("cleanup"); out != "Nothing to remove\n" {
				t.Errorf("cleanup of nothing: %q", out)
			}
			n.start(podCIDRs)
			n.expectHook(hook)
			up := n.tapWorld()
			up.want(n.WorldAddr.V4, n.NodeAddr.V4)
			if n.footprint() == before {
				t.Error("the footprint does not show the data plane: it proves nothing")
			}
			wantError(t, n.try("cleanup"), 1, "an agent runs here", "hint: --force", "hint: stop")
			n.awaitOK()
			up.want(n.WorldAddr.V4, n.NodeAddr.V4)
			// With another run directory the lock tells.
			runDir := n.runDir
			n.runDir += "2"
			wantError(t, n.try("cleanup"), 1, n.place(), "hint: --run-dir")
			n.runDir = runDir

			if out := n.cli("cleanup", "--force"); !strings.Contains(out, "Ending the agent") {
				t.Errorf("cleanup --force: %q", out)
			}
			if err := n.agent.wait(t, patience); err != nil {
				t.Errorf("agent ended by cleanup: %v", err)
			}
			if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.footprint(), "\n")); diff != "" {
				t.Errorf("what cleanup left, or took (-before +after):\n%s", diff)
			}
			for _, path := range []string{n.bpfRoot, n.runDir} {
				if _, err := os.Stat(path); !os.IsNotExist(err) {
					t.Errorf("%s is still there: %v", path, err)
				}
			}
			up.want(n.WorldAddr.V4, n.PodAddrs[0].V4)
			if out := n.cli("cleanup"); out != "Nothing to remove\n" {
				t.Errorf("second cleanup: %q", out)
			}
			wantError(t, n.try("status"), 1, "no agent and no data plane")
			if hook == datapath.HookTC {
				return
			}
			n.start(podCIDRs)
			up.want(n.WorldAddr.V4, n.NodeAddr.V4)
			n.stop()
			if out := n.cli("cleanup"); !strings.Contains(out, n.place()) || !strings.Contains(out, n.runDir) {
				t.Errorf("cleanup names nothing: %q", out)
			}
		})
	}
}

// With --stay cleanup ends when it is told to, and not with the work: what it has removed is
// gone before.
func TestCleanupStays(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	n.stop()
	out := new(logBuffer)
	cmd := exec.Command(n.bin, n.command([]string{"cleanup", "--stay", "--bpf-root", n.bpfRoot, "--run-dir", n.runDir})...)
	cmd.Env = append(os.Environ(), n.lockFile())
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, startIn(n.Node, cmd))
	p := watch(cmd, nil)
	defer p.kill()
	labtest.Eventually(t, patience, func() error {
		if p.ended() {
			t.Fatalf("ended by itself: %v\n%s", p.err, out)
		}
		if !strings.Contains(out.String(), "Removed "+n.runDir+"\n") { // its last line
			return fmt.Errorf("output %q", out)
		}
		return nil
	})
	wantError(t, n.try("status"), 1, "no agent and no data plane")
	if p.ended() {
		t.Fatalf("ended by itself: %v\n%s", p.err, out)
	}
	must(t, cmd.Process.Signal(syscall.SIGTERM))
	if err := p.wait(t, patience); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, out)
	}
}

// A slip in --bpf-root must not empty another directory.
func TestCleanupOfAnotherDirectory(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	root := n.bpfRoot
	n.bpfRoot = n.dir
	wantError(t, n.try("cleanup"), 1, n.dir, "hint: --bpf-root")
	n.bpfRoot = root[:strings.LastIndex(root, "/")]
	wantError(t, n.try("cleanup"), 1, n.bpfRoot, "hint: --bpf-root")
}
