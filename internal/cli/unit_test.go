package cli

import (
	"os"
	"strings"
	"testing"
)

// TestUnit keeps the unit and the command line together.
func TestUnit(t *testing.T) {
	data, err := os.ReadFile("../../packaging/systemd/bauta.service")
	if err != nil {
		t.Fatal(err)
	}
	unit := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(key, "#") {
			unit[key] = value
		}
	}
	args := strings.Fields(unit["ExecStart"])[1:]
	c, rest, err := newRoot(Env{}).Find(args)
	if err != nil || c.Name() != "agent" {
		t.Fatalf("ExecStart: %v", err)
	}
	if err := c.ParseFlags(rest); err != nil {
		t.Errorf("ExecStart: %v", err)
	}
	runDir := c.Flag("run-dir")
	if runDir == nil || runDir.DefValue != "/run/"+unit["RuntimeDirectory"] {
		t.Errorf("RuntimeDirectory=%s is not the default of --run-dir", unit["RuntimeDirectory"])
	}
	if bpf := c.Flag("bpf-root"); bpf == nil || !strings.HasPrefix(bpf.DefValue, unit["RequiresMountsFor"]+"/") {
		t.Errorf("RequiresMountsFor=%s is not the place of --bpf-root", unit["RequiresMountsFor"])
	}
}
