package e2e_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// notifications is a service manager that listens.
type notifications struct {
	t    testing.TB
	conn *net.UnixConn
	path string
}

func listenNotify(t testing.TB) *notifications {
	t.Helper()
	dir, err := os.MkdirTemp("", "bauta-e2e-") // the path of a socket is short
	must(t, err)
	labtest.Close(t, func() error { return os.RemoveAll(dir) })
	s := &notifications{t: t, path: filepath.Join(dir, "notify")}
	s.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.path, Net: "unixgram"})
	must(t, err)
	labtest.Close(t, s.conn.Close)
	return s
}

// await returns what came until a message that has the text in it.
func (s *notifications) await(text string) (before []string, message string) {
	s.t.Helper()
	must(s.t, s.conn.SetReadDeadline(time.Now().Add(patience)))
	buf := make([]byte, 4096)
	for {
		n, err := s.conn.Read(buf)
		if err != nil {
			s.t.Fatalf("no %q after %q: %v", text, before, err)
		}
		if message = string(buf[:n]); strings.Contains(message, text) {
			return before, message
		}
		before = append(before, message)
	}
}

// What systemd is told, and what signals do.
func TestSignals(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	manager := listenNotify(t)
	n.env = []string{"NOTIFY_SOCKET=" + manager.path, "WATCHDOG_USEC=400000"}
	path := n.writeList("10.0.0.0/8")
	n.launch(podCIDRs, "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+path)
	manager.await("READY=1")
	if got, err := n.inKernel(); err != nil || got != "10.0.0.0/8 169.254.0.0/16 fe80::/10" {
		t.Errorf("ready with %s in the kernel: %v", got, err)
	}
	if st := n.state(); !st.Agent.Ready {
		t.Errorf("ready by systemd, not by the status: %+v", st.Agent)
	}
	manager.await("STATUS=masquerading on eth0")
	manager.await("WATCHDOG=1")
	manager.await("WATCHDOG=1")

	before := n.state().Agent.LastApply
	must(t, n.agent.cmd.Process.Signal(syscall.SIGHUP))
	_, message := manager.await("RELOADING=1")
	if !strings.Contains(message, "\nMONOTONIC_USEC=") {
		t.Errorf("reloading: %q", message)
	}
	manager.await("READY=1")
	if after := n.state().Agent.LastApply; !after.After(before) {
		t.Errorf("SIGHUP applied nothing: %v, then %v", before, after)
	}
	n.write("ip-masq-agent", "nonMasqueradeCIDRs: [x]")
	n.awaitDegraded("config rejected")
	must(t, n.agent.cmd.Process.Signal(syscall.SIGHUP)) // with a bad file it runs on
	manager.await("READY=1")
	n.awaitDegraded("config rejected")

	// A packet in flight: the data plane does not notice the end of the agent.
	up := n.tapWorld()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		if n.agent.ended() {
			n.start(podCIDRs)
		}
		must(t, n.agent.cmd.Process.Signal(sig))
		if err := n.agent.wait(t, patience); err != nil {
			t.Errorf("%v: %v", sig, err)
		}
		manager.await("STOPPING=1")
		if _, err := os.Stat(filepath.Join(n.runDir, "agent.sock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket after %v: %v", sig, err)
		}
		up.want(n.WorldAddr.V4, n.NodeAddr.V4)
	}
	if st := n.state(); st.Agent.State != agent.Down || !st.Datapath.Applied {
		t.Errorf("%+v %+v", st.Agent, st.Datapath)
	}
}

// Steps of the wall clock do not matter, since no program reads it, or one that
// counts the time of sleep: those would age mappings by a step.
func TestProgramsReadMonotonicClock(t *testing.T) {
	t.Parallel()
	spec, err := ebpf.LoadCollectionSpec("../../internal/datapath/masq_bpfel.o")
	must(t, err)
	clocks := map[asm.BuiltinFunc]bool{
		asm.FnKtimeGetNs: true, asm.FnKtimeGetCoarseNs: true,
		asm.FnJiffies64:      true, // stands still in sleep, too
		asm.FnKtimeGetBootNs: false, asm.FnKtimeGetTaiNs: false,
	}
	found := 0
	for name, program := range spec.Programs {
		for _, ins := range program.Instructions {
			if !ins.IsBuiltinCall() {
				continue
			}
			if monotonic, isClock := clocks[asm.BuiltinFunc(ins.Constant)]; isClock && !monotonic {
				t.Errorf("%s calls %v", name, asm.BuiltinFunc(ins.Constant))
			} else if isClock {
				found++
			}
		}
	}
	if found == 0 {
		t.Error("no program reads a clock: the test looks for the wrong thing")
	}
}

// systemd accepts the unit.
func TestUnitFile(t *testing.T) {
	t.Parallel()
	analyze := labtest.Tool(t, "systemd-analyze")
	data, err := os.ReadFile("../../packaging/systemd/bauta.service")
	must(t, err)
	unit := filepath.Join(t.TempDir(), "bauta.service")
	must(t, os.WriteFile(unit, []byte(strings.ReplaceAll(string(data), "/usr/bin/bauta ", bautaBin+" ")), 0o644))
	ns := labtest.NewNS(t)
	if out, err := ns.Run(within(t, patience), analyze, "verify", unit); err != nil || out != "" {
		t.Errorf("%v\n%s", err, out)
	}
}
