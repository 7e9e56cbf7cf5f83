package e2e_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/agent"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// The sentinel raises an alarm when packets leave a device past our egress program,
// also with the agent down, and the agent repairs what it can.
func TestLeakSentinel(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	n.noTCX = true // a filter is taken off with tc
	n.start(podCIDRs, "--leak-sentinel")
	if st := n.status(); !st.Leaks.Sentinel || st.Leaks.Packets != 0 || len(st.Degraded()) != 0 {
		t.Fatalf("%+v, degraded %v", st.Leaks, st.Degraded())
	}
	n.kill()
	labtest.Tool(t, "tc")
	out, err := n.Node.Run(t.Context(), "tc", "filter", "show", "dev", "eth0", "egress")
	if err != nil || strings.Count(out, "bauta_") != 2 {
		t.Fatalf("filters: %v\n%s", err, out)
	}
	if out, err := n.Node.Run(t.Context(), "tc", "filter", "del", "dev", "eth0", "egress", "prio", "1"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	echo := server(t, lab.EchoUDP, n.World, anyPort(n.WorldAddr.V4))
	var st agent.Status
	labtest.Eventually(t, 10*time.Second, func() error {
		c, err := lab.DialUDP(t.Context(), n.Pods[0], anyPort(n.PodAddrs[0].V4), echo)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("leak")); err != nil {
			return err
		}
		if st = n.status(); st.Leaks.Packets == 0 {
			return errors.New("no leak seen")
		}
		return nil
	})
	s := st.Leaks.Samples[0]
	if s.Device != "eth0" || s.Source != n.PodAddrs[0].V4 || s.Destination != n.WorldAddr.V4 || s.Proto != 17 {
		t.Errorf("%+v", s)
	}
	isLeak := func(text string) bool { return strings.HasPrefix(text, "leak") }
	if !slices.ContainsFunc(st.Degraded(), isLeak) || !slices.ContainsFunc(st.Warnings, isLeak) {
		t.Errorf("degraded %v, warnings %v", st.Degraded(), st.Warnings)
	}
	if r := n.try("status"); r.code != 3 || !strings.Contains(r.stdout, "Leaks:") {
		t.Errorf("exit status %d\n%s", r.code, r.stdout)
	}
	// The next agent attaches the egress program again. It still knows of the leak.
	n.start(n.agent.args...)
	if st := n.status(); st.Leaks.Packets == 0 || !st.Leaks.Sentinel {
		t.Errorf("%+v", st.Leaks)
	}
	n.stop()
	n.start(podCIDRs)
	if st := n.status(); st.Leaks.Packets != 0 || st.Leaks.Sentinel || len(st.Degraded()) != 0 {
		t.Errorf("off: %+v, degraded %v", st.Leaks, st.Degraded())
	}
	n.stop()
	n.cli("cleanup")
	if out, err := n.Node.Run(t.Context(), "tc", "filter", "show", "dev", "eth0", "egress"); err != nil || strings.Contains(out, "bauta") {
		t.Errorf("after cleanup: %v\n%s", err, out)
	}
}
