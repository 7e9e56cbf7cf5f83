package cli

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/advice"
)

func TestRemoveRunFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"agent.sock", "policy.json", ".policy.json.123", "mine"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := removeRunFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(removed)
	want := []string{filepath.Join(dir, ".policy.json.123"), filepath.Join(dir, "agent.sock"), filepath.Join(dir, "policy.json")}
	if !slices.Equal(removed, want) {
		t.Errorf("removed %q, want %q", removed, want)
	}
	if _, err := os.Stat(filepath.Join(dir, "mine")); err != nil {
		t.Errorf("a file of somebody else: %v", err)
	}
	os.Remove(filepath.Join(dir, "mine"))
	if removed, err := removeRunFiles(dir); err != nil || !slices.Equal(removed, []string{dir}) {
		t.Errorf("removed %q, %v, want the directory", removed, err)
	}
	if removed, err := removeRunFiles(dir); err != nil || removed != nil {
		t.Errorf("removed %q, %v, want nothing", removed, err)
	}
}

func TestAgentPID(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	if _, running := agentPID(path); running {
		t.Error("an agent without a socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	if pid, running := agentPID(path); !running || pid != os.Getpid() {
		t.Errorf("pid %d, %v, want %d", pid, running, os.Getpid())
	}
	l.SetUnlinkOnClose(false) // as a killed agent leaves it
	l.Close()
	if _, running := agentPID(path); running {
		t.Error("an agent behind a stale socket")
	}
}

func TestEndProcess(t *testing.T) {
	c := exec.CommandContext(t.Context(), "sleep", "60")
	if err := c.Start(); err != nil {
		t.Skipf("no sleep(1): %v", err)
	}
	waited := make(chan struct{})
	go func() { c.Wait(); close(waited) }()
	if err := endProcess(t.Context(), c.Process.Pid); err != nil {
		t.Fatal(err)
	}
	<-waited
	if err := endProcess(t.Context(), c.Process.Pid); err != nil {
		t.Errorf("of one that is gone: %v", err)
	}
}

// An agent of a container, seen from another one, has no number that could be killed.
func TestAgentInTheWay(t *testing.T) {
	for _, c := range []struct {
		pid        int
		force      bool
		want, hint string
	}{
		{7, true, "", ""},
		{7, false, "cleanup: an agent runs here (pid 7, run directory /r)", "stop it first: systemctl stop bauta, or kill 7"},
		{0, false, "cleanup: an agent runs here (run directory /r), in another PID namespace: it can't be ended from here", "stop its container first"},
		{0, true, "cleanup: an agent runs here (run directory /r), in another PID namespace: it can't be ended from here", "stop its container first"},
	} {
		err := inTheWay(c.pid, "/r", c.force)
		if hints := strings.Join(advice.Of(err), "; "); (err != nil) != (c.want != "") || err != nil && err.Error() != c.want || !strings.HasPrefix(hints, c.hint) || strings.Contains(hints, "kill 0") {
			t.Errorf("%+v: %v; %s", c, err, hints)
		}
	}
}
