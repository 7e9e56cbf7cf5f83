package e2e_test

import (
	"strings"
	"testing"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
)

// The data plane stays when the agent goes, and the next agent takes it over.
func TestAgentComesAndGoes(t *testing.T) {
	t.Parallel()
	n := startNode(t, lab.Options{})
	if out := n.cli("status", "--brief"); out != "OK\n" {
		t.Errorf("status --brief: %q", out)
	}
	n.kill()
	if r := n.try("status", "--brief"); r.code != 3 || !strings.Contains(r.stdout, "down") {
		t.Errorf("after a crash: %+v", r)
	}
	n.bin = upgradeBin
	n.start(n.agent.args...)
	if st := n.status(); st.Agent.Version != "e2e-2" || st.Agent.State != agent.Running {
		t.Errorf("after an upgrade: %+v", st.Agent)
	}
	n.restart()
	n.stop()
	if st := n.status(); st.Agent.State != agent.Down || !st.Datapath.Applied {
		t.Errorf("stopped: %+v %+v", st.Agent, st.Datapath)
	}
	if out := n.cli("cleanup"); out == "" {
		t.Error("cleanup says nothing")
	}
	if r := n.try("status"); r.code != 1 {
		t.Errorf("after cleanup: %+v", r)
	}
}
