package e2e_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// second runs another agent beside the one of the node, which must refuse.
func (n *node) second(args ...string) result {
	n.t.Helper()
	return n.try(append([]string{"agent", "--allow-private-bpffs", podCIDRs}, args...)...)
}

// Two agents in one place: the second one goes away, and leaves nothing.
func TestTwoAgents(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.env = []string{"NOTIFY_SOCKET=" + filepath.Join(n.dir, "none")} // no reason not to run
	n.start(podCIDRs)
	up := n.tapWorld()
	root, runDir := n.bpfRoot, n.runDir
	wantError(t, n.second(), 1, "another agent is running", "hint: --bpf-root", "hint: stop")
	n.runDir += "2"
	wantError(t, n.second(), 1, n.isTaken(root, "another agent is running", "hint: --bpf-root")...)
	if _, err := os.Stat(n.runDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("run directory of the refused agent: %v", err)
	}
	n.runDir = runDir
	n.bpfRoot += "2"
	wantError(t, n.second(), 1, runDir, "another agent is running", "hint: --run-dir")
	if _, err := os.Stat(n.bpfRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data plane of the refused agent: %v", err)
	}
	n.bpfRoot = root
	if st := n.awaitOK(); st.Agent.PID != n.agent.cmd.Process.Pid {
		t.Errorf("%+v", st.Agent)
	}
	up.want(n.WorldAddr.V4, n.NodeAddr.V4)
}

// Two nodes with places of their own run side by side on one machine: that is
// what every other test here does. What a crash leaves is no hindrance.
func TestAfterCrash(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	up := n.tapWorld()
	n.kill()
	socket := filepath.Join(n.runDir, "agent.sock")
	if info, err := os.Lstat(socket); err != nil || info.Mode().Type() != os.ModeSocket {
		t.Fatalf("a crash left no socket: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(n.runDir, ".policy.json.123"), []byte("{"), 0o600))
	up.want(n.WorldAddr.V4, n.NodeAddr.V4) // the data plane works

	// Some pins or chains are gone: a new agent makes it whole again.
	random := labtest.Rand(t)
	parts := n.parts()
	random.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
	for _, names := range [][]string{parts[:1], parts[len(parts)/2:]} {
		for _, name := range names {
			n.breakPart(name)
		}
		t.Logf("without %q", names)
		if r := n.try("status"); r.code == 0 || r.code == 2 {
			t.Errorf("status without %q: %+v", names, r)
		}
		n.start(podCIDRs)
		n.awaitOK()
		up.want(n.WorldAddr.V4, n.NodeAddr.V4)
		up.want(n.WorldAddr.V6, n.NodeAddr.V6)
		n.kill()
	}
	must(t, os.Remove(socket))
	must(t, os.WriteFile(socket, nil, 0o600)) // nobody's socket
	wantError(t, n.second(), 1, socket)
	n.cli("cleanup")
	up.want(n.WorldAddr.V4, n.PodAddrs[0].V4)
}

// Killed, and started with other devices: the old one drains.
func TestOtherOptionsAfterCrash(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{SecondUplink: true}, "--devices=eth0,eth1")
	n.awaitAttached("eth0", "eth1")
	echo := server(t, lab.EchoTCP, n.World2, netip.AddrPortFrom(n.WorldAddr2.V4, 8080))
	conn, seen := n.talk(0, echo, 0)
	if seen.Addr() != n.NodeAddr2.V4 {
		t.Errorf("seen as %s", seen)
	}
	n.kill()
	n.start(podCIDRs, "--devices=eth+,!eth1", "--snat-port-range=50000-50099")
	st := n.awaitOK() // draining is no defect
	if !slices.Equal(attached(st), []string{"eth0"}) {
		t.Errorf("devices %+v", st.Devices)
	}
	n.inBPF(func() {
		if out := n.cli("status"); len(st.Devices) != 2 || st.Devices[1].State != agent.DeviceDraining || !strings.Contains(out, "draining") || !strings.Contains(out, "   [eth0]   ") {
			t.Errorf("status:\n%s", out)
		}
	})
	if !answers(conn) {
		t.Error("the connection on the draining device does not answer")
	}
	n.tap(n.World2).want(n.WorldAddr2.V4, n.PodAddrs[0].V4)
	echo = server(t, lab.EchoTCP, n.World, netip.AddrPortFrom(n.WorldAddr.V4, 8080))
	if _, seen := n.talk(0, echo, 33333); seen.Port() < 50000 || seen.Port() > 50099 {
		t.Errorf("a new connection has port %d", seen.Port())
	}
}

// A run directory that can't be used, or stops being writable.
func TestRunDir(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	runDir := n.runDir
	n.runDir = "/proc/bauta"
	wantError(t, n.second(), 1, "run-dir", "/proc/bauta")
	n.runDir = n.write("file", "")
	wantError(t, n.second(), 1, "run-dir", n.runDir)
	n.runDir = filepath.Join(n.dir, "open")
	must(t, os.Mkdir(n.runDir, 0o700))
	must(t, os.Chmod(n.runDir, 0o777))
	wantError(t, n.second(), 1, "run-dir", n.runDir, "hint: chmod")
	n.runDir = filepath.Join(n.dir, strings.Repeat("long", 30))
	wantError(t, n.second(), 1, n.runDir, "too long", "hint: --run-dir")

	n.runDir = runDir
	must(t, os.Mkdir(runDir, 0o700))
	must(t, unix.Mount("tmpfs", runDir, "tmpfs", 0, "mode=0700"))
	t.Cleanup(func() { unix.Unmount(runDir, unix.MNT_DETACH) })
	readOnly := func(flag uintptr) { must(t, unix.Mount("", runDir, "", unix.MS_REMOUNT|flag, "mode=0700")) }
	readOnly(unix.MS_RDONLY)
	wantError(t, n.second(), 1, runDir, "read-only file system")
	if _, err := os.Stat(n.bpfRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("data plane of a refused agent: %v", err)
	}

	readOnly(0)
	path := n.writeList("10.0.0.0/8")
	n.start(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	readOnly(unix.MS_RDONLY)
	n.writeList("198.51.100.0/24")
	n.awaitKernel("169.254.0.0/16 198.51.100.0/24 fe80::/10")
	n.await("warning about policy.json", func(st agent.Status) bool {
		return slices.ContainsFunc(st.Warnings, func(s string) bool { return strings.Contains(s, "policy.json") })
	})
	readOnly(0)
	n.writeList("198.51.100.0/25")
	n.await("no warning", func(st agent.Status) bool { return len(st.Warnings) == 0 })
}

// The bpffs: missing, private to a mount namespace, or something else.
func TestBPFFS(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	root := n.bpfRoot
	n.bpfRoot = filepath.Join(n.dir, "bauta")
	wantError(t, n.second(), 1, n.bpfRoot, "not on a bpffs", "hint: mount -t bpf")
	if _, err := os.Stat(n.bpfRoot); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", n.bpfRoot, err)
	}
	n.bpfRoot = root
	// In a mount namespace of its own the pins would vanish with it.
	unshare := labtest.Tool(t, "unshare")
	dir := filepath.Join(n.dir, "bpf")
	must(t, os.Mkdir(dir, 0o700))
	out, err := n.Node.Run(within(t, patience), unshare, "--mount", "--propagation=private", "sh", "-c",
		`mount -t bpf bpf "$1" && exec "$2" agent --pod-cidrs 10.0.0.0/16 --run-dir "$3" --bpf-root "$1"/bauta`, "sh", dir, n.bin, n.runDir)
	wantError(t, result{stderr: out, code: exitCode(err)}, 1, dir, "private mount namespace", "hint: /sys/fs/bpf", "hint: allow-private-bpffs")
	out, err = n.Node.Run(within(t, patience), unshare, "--mount", "--propagation=private", "sh", "-c",
		`umount -l /sys/fs/bpf 2>/dev/null; exec "$1" agent --pod-cidrs 10.0.0.0/16 --run-dir "$2" --bpf-root /sys/fs/bpf/bauta-e2e`, "sh", n.bin, n.runDir)
	wantError(t, result{stderr: out, code: exitCode(err)}, 1, "/sys/fs/bpf", "hint: mount")
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return map[bool]int{true: 0, false: -1}[err == nil]
}

// Without root every command says so, or works.
func TestNotRoot(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	dir, err := os.MkdirTemp("", "bauta-e2e-nobody-")
	must(t, err)
	labtest.Close(t, func() error { return os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	bin := filepath.Join(dir, "bauta")
	must(t, copyFile(bin, n.bin))
	nobody := func(args ...string) result {
		cmd := exec.Command(bin, append(args, "--bpf-root", n.bpfRoot, "--run-dir", n.runDir)...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		must(t, n.Node.Start(cmd))
		return result{code: exitCode(cmd.Wait()), stdout: stdout.String(), stderr: stderr.String()}
	}
	must(t, os.Chmod(filepath.Dir(n.dir), 0o755))
	wantError(t, nobody("agent", podCIDRs), 1, "agent: must run as root", "hint: sudo")
	wantError(t, nobody("cleanup"), 1, "cleanup: must run as root", "hint: sudo")
	wantError(t, nobody("bpf", "nat", "flush"), 1, "must run as root", "hint: sudo")
	wantError(t, nobody("status"), 1, "hint: root")
	for _, list := range []string{"nat", "ipmasq", "node"} {
		wantError(t, nobody("bpf", list, "list"), 1, n.bpfRoot, "hint: root")
	}
	wantError(t, nobody("demo"), 1, "root")
	for _, args := range [][]string{{"version"}, {"help"}, {"completion", "bash"}} {
		if r := nobody(args...); r.code != 0 || r.stdout == "" {
			t.Errorf("%q: %+v", args, r)
		}
	}
}

// copyFile copies a program. A process of its own writes it: one that is started meanwhile would
// inherit our file, and nobody can run what somebody writes to.
func copyFile(to, from string) error {
	out, err := exec.Command("cp", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w\n%s", from, err, out)
	}
	return nil
}
