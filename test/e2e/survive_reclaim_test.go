package e2e_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// The agent is killed, and stays away: mappings past their timers go nevertheless,
// and connections that live stay. The wait for the agent (a minute) is cut short by
// moving its last sign of life into the past; the kernel then walks a table each 15 s.
func TestReclaimWithoutAgent(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.BPFTimer)
	n := newNode(t, lab.Options{})
	n.start(podCIDRs, "--nat-timeout-udp=1s", "--nat-timeout-udp-stream=1s", "--nat-timeout-tcp-syn=1s")
	k := converse(t, n.Pods[0], 20, server(t, lab.EchoTCP, n.World, anyPort(n.WorldAddr.V4)))
	k.goesOn(t, "before")
	before := n.mappings()
	if st := n.status(); !strings.Contains(st.Datapath.Tier, "; expiry without the agent by a ") {
		t.Errorf("tier %q", st.Datapath.Tier)
	}
	n.kill()
	echo := server(t, lab.EchoUDP, n.World, anyPort(n.WorldAddr.V4))
	for range 30 { // without an agent
		if _, err := lab.AskUDP(within(t, 5*time.Second), n.Pods[0], netip.AddrPort{}, echo, []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(n.natList("--proto", "udp")); got != 60 {
		t.Fatalf("%d lines of UDP mappings, want 60", got)
	}
	silence(t, filepath.Join(n.bpfRoot, "control"))
	labtest.Eventually(t, 45*time.Second, func() error {
		if left := n.natList("--proto", "udp"); len(left) > 0 {
			return fmt.Errorf("%d UDP mappings are still there", len(left)/2)
		}
		return nil
	})
	k.goesOn(t, "without an agent")
	sameMappings(t, "without an agent", before, n.mappings())
	n.start(n.agent.args...)
	k.goesOn(t, "agent back")
	sameMappings(t, "agent back", before, n.mappings())
}

// silence moves the heartbeat of struct state into the past.
func silence(t *testing.T, pin string) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(pin, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	const heartbeat = 12
	second := binary.NativeEndian.Uint32(b[heartbeat:])
	if second == 0 {
		t.Fatal("no heartbeat")
	}
	binary.NativeEndian.PutUint32(b[heartbeat:], second-61)
	if err := m.Put(uint32(0), b); err != nil {
		t.Fatal(err)
	}
}
